"""The rooms' walls: what each of them may import, and that the front doors work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("spaces", "trainer", "search", "analysis")
FORBIDDEN = {
    "spaces": ("torch", "ray", "mlflow", "pandas", "trainer", "search", "analysis"),
    "trainer": ("ray", "optuna", "mlflow", "pandas", "spaces", "search", "analysis"),
    "search": ("analysis", "plotly"),
    "analysis": ("torch", "ray", "trainer", "search", "spaces"),
}


def modules_of(room: str) -> list[str]:
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / room).rglob("*.py")
        if path.name != "cli.py"  # the composition root may know every room
    )


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules_of(room)!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert room in loaded
    assert not loaded & set(FORBIDDEN[room])


def test_the_front_doors_open() -> None:
    from analysis import load_sweep
    from search import Sweep, SweepConfig
    from trainer import TrainConfig, Trainer

    assert all(map(callable, (load_sweep, Sweep, SweepConfig, TrainConfig, Trainer)))


def test_a_worker_pays_for_neither_mlflow_nor_optuna() -> None:
    code = "import search.trainable, sys; print('mlflow' in sys.modules, 'optuna' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("room", ROOMS)
def test_files_stay_readable(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 410, path
