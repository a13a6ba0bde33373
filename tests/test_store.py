"""A new store of MLflow's is there whole or not at all, whoever makes it at the same moment."""

import subprocess
import sys
from pathlib import Path

import pytest

from search.store import connect

ROOT = Path(__file__).parent.parent
USE = """
import sys
from search.store import connect
connect(f"sqlite:///{sys.argv[1]}").create_experiment(sys.argv[2])
"""


@pytest.mark.slow
def test_processes_that_make_one_store_at_once_share_it(tmp_path: Path) -> None:
    """MLflow alone leaves tables half made, and a store that never works again."""
    database = tmp_path / "mlflow.db"
    users = [
        subprocess.Popen([sys.executable, "-c", USE, str(database), name], cwd=ROOT)
        for name in ("one", "two")
    ]
    assert [user.wait(timeout=120) for user in users] == [0, 0]
    found = connect(f"sqlite:///{database}").search_experiments()
    assert {each.name for each in found} == {"Default", "one", "two"}
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
