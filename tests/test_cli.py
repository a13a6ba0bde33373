"""The command line as a user meets it: what it prints, writes and refuses.

One sweep is run by a process, as a user does; the other verbs run in this one, and their sweeps on
one Ray, for speed.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import Verbs
from tests.extent import long

TINY = ["--epochs", "1", "--trials", "2", "--train-limit", "200", "--set", "batch_size=64",
        "--max-concurrent", "1"]  # fmt: skip


def contrasweep(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", "from search.cli import main; main()", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


BAD_SWEEPS: dict[str, tuple[list[str], str]] = {
    "misspelt option": (["--trial", "3"], "No such option: --trial"),
    "option without value": (["--epochs"], "--epochs"),
    "option that is no number": (["--epochs", "x"], "--epochs"),
    "unknown space": (["--space", "nope"], "quick"),
    "unknown dataset": (["--dataset", "nope"], "digits"),
    "missing folder": (["--dataset", "folder:/does/not/exist"], "/does/not/exist"),
    "unknown encoder": (["--set", "encoder=nope"], "conv_small"),
    "unknown loss": (["--set", "loss=nope"], "nt_xent"),
    "unknown optimizer": (["--set", "optimizer=nope"], "adamw"),
    "unknown objective": (["--objective", "nope"], "knn_top1"),
    "incomparable objective": (["--objective", "val_loss"], "not comparable"),
    "unknown field": (["--set", "learning_rate=1"], "unknown field 'learning_rate'"),
    "field without value": (["--set", "lr"], "FIELD=VALUE"),
    "value out of range": (["--set", "temperature=-1"], "temperature"),
    "not a number": (["--set", "lr=fast"], "lr"),
    "field that nothing reads": (["--set", "margin=2"], "margin has no effect: loss=nt_xent"),
    "device that is not here": (["--set", "device=cuda:1"], "set device=cuda"),
    "device of no kind": (["--set", "device=tpu"], "auto, cpu, cuda"),
    "not finite": (["--set", "lr=nan"], "lr"),
    "owned by an option": (["--set", "epochs=3"], "--epochs"),
    "set though the sweep decides": (["--set", "report_every=5"], "--report-every"),
    "infinite": (["--report-every", "inf"], "report_every"),
    "Ray client": (["--address", "ray://127.0.0.1:10001"], "--address auto"),
    "credentials": (["--tracking-uri", "http://me:pw@127.0.0.1:1"], "MLFLOW_TRACKING_USERNAME"),
    "empty fixed": (["--config", "nullfixed.yaml", "--space", "nope"], "quick"),
    "zero trials": (["--trials", "0"], "trials"),
    "negative epochs": (["--epochs", "-1"], "epochs"),
    "grace above the end": (["--epochs", "2", "--grace", "3"], "grace"),
    "reduction of one": (["--reduction", "1"], "reduction"),
    "batch above the train split": (["--set", "batch_size=50000"], "batch_size"),
    "unknown sampler": (["--sampler", "nope"], "tpe"),
    "grid points without a grid": (["--grid-points", "4"], "without --sampler grid"),
    "end of no budget": (["--on-budget", "stop"], "without --max-hours"),
    "grace of no scheduler": (["--scheduler", "none", "--grace", "2"], "--grace has no effect"),
    "reduction of the median": (["--scheduler", "median", "--reduction", "2"], "--scheduler asha"),
    "unknown scheduler": (["--scheduler", "nope"], "asha"),
    "name with a slash": (["--name", "a/b"], "folder name"),
    "no tracking server": (["--tracking-uri", "http://127.0.0.1:9"], "use --offline-tracking"),
    "no tracking database": (["--tracking-uri", "postgresql://127.0.0.1:9/x"], "offline-tracking"),
    "nothing at once": (["--max-concurrent", "0"], "max_concurrent"),
    "file store": (["--tracking-uri", "file:///tmp/x"], "unsupported tracking URI"),
    "missing space file": (["--space", "nofile.py:space"], "nofile.py"),
    "no such function": (["--space", "mine.py:other"], "other"),
    "space of unknown fields": (["--space", "mine.py:unknown_field"], "nonsense"),
    "space that returns nothing": (["--space", "mine.py:nothing"], "nothing"),
    "space that varies the data": (["--space", "mine.py:varies"], "image_size"),
    "space that raises": (["--space", "mine.py:raises"], "division"),
    "missing config": (["--config", "none.yaml"], "none.yaml"),
    "config of unknown fields": (["--config", "bad.yaml"], "colour"),
    "config that is no YAML": (["--config", "broken.yaml"], "broken.yaml"),
}

MINE = """
def unknown_field(trial):
    return {"lr": trial.suggest_float("lr", 1e-4, 1e-3), "nonsense": 1}
def nothing(trial):
    trial.suggest_float("lr", 1e-4, 1e-3)
def varies(trial):
    return {"image_size": trial.suggest_categorical("image_size", [16, 32])}
def raises(trial):
    return {"lr": 1 / 0}
"""


@pytest.mark.parametrize("name", BAD_SWEEPS)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, for speed: what `main` does with each mistake."""
    from search.cli import main

    arguments, expected = BAD_SWEEPS[name]
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "bad.yaml").write_text("colour: blue\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "nullfixed.yaml").write_text("fixed:\n")
    before = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["contrasweep", "sweep", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    message = capsys.readouterr().err.strip()
    assert ended.value.code == 2, message
    assert expected in message
    assert "\n" not in message
    assert "Traceback" not in message
    assert [path for path in written(tmp_path) if "__pycache__" not in path] == before


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verbs: Verbs
) -> None:
    """Not of `auto`, which would join the cluster of a test that runs beside this one."""
    import ray

    assert not ray.is_initialized()  # else the address is not asked
    monkeypatch.chdir(tmp_path)
    code, _, err = verbs("sweep", "--address", "127.0.0.1:9", *TINY)
    assert code == 2
    assert err.splitlines()[-1].startswith("contrasweep: no Ray cluster answers")
    assert written(tmp_path) == []


@pytest.mark.slow
def test_more_than_any_node_has_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verbs: Verbs, one_ray: None
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--cpus-per-trial is 999" in verbs.refused("sweep", "--cpus-per-trial", "999")
    assert written(tmp_path) == []


@pytest.mark.parametrize("verb", ["spaces", "datasets", "encoders", "losses", "fields"])
def test_what_there_is_has_one_line_each(verb: str, verbs: Verbs) -> None:
    known = verbs.json(verb)
    assert known
    assert all(isinstance(text, str) and text for text in known.values())
    assert set(known) <= set(verbs.told(verb).split())


def test_a_space_is_shown_whole(tmp_path: Path, verbs: Verbs) -> None:
    (tmp_path / "mine.py").write_text(
        'def space(trial):\n    return {"lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}\n'
    )
    shown = verbs.json("spaces", f"{tmp_path / 'mine.py'}:space")
    lr = {"name": "lr", "values": "0.0001 to 0.01, log", "condition": ""}
    assert shown["parameters"] == [lr]
    assert len(shown["samples"]) == 10
    lines = verbs.told("spaces", "losses")
    assert "loss: barlow_twins, vicreg" in lines
    assert "10 loss=" in lines


def test_a_leaderboard_of_many_parameters_fits_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from search import console

    def told(width: int) -> str:
        file = io.StringIO()
        monkeypatch.setattr(console, "out_console", Console(width=width, file=file))
        row: dict[str, Any] = {
            "number": 3,
            "ending": "pruned",
            "is_default": False,
            "audited": None,
        }
        row |= {"objective": 0.5, "epochs": 2.0, "loss": "align_uniform", "margin": None}
        row |= {f"parameter{number}": number for number in range(8)}
        console.print_leaderboard([row], "knn_top1")
        return file.getvalue()

    assert "loss align_uniform  parameter0 0" in " ".join(told(80).split("\n"))
    assert "margin" not in told(80)  # the trial has none
    assert len(told(80).splitlines()) < 8
    assert "parameter7" in told(200).splitlines()[0]


def test_help_is_quick_and_shows_defaults(tmp_path: Path) -> None:
    done = contrasweep("sweep", "--help", cwd=tmp_path)
    assert "--space" in done.stdout
    assert "quick" in done.stdout


def test_train_writes_its_run_and_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verbs: Verbs
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--epochs", "1", "--train-limit", "200", "--set", "batch_size=64",
                 "--set", "lr=2e-3", "--seed", "3", "--test", "--out", "run", "--json"]  # fmt: skip
    told = json.loads(verbs.told(*arguments))
    assert told["samples_seen"] == 256
    assert 0 < told["metrics"]["test_knn_top1"] <= 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 2e-3
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
    assert "not empty" in verbs.refused(*arguments)


@long
@pytest.mark.slow
def test_a_sweep_without_any_result_does_not_exit_with_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verbs: Verbs, one_ray: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(
        "def small(z0, z1, config):\n"
        "    if len(z0) > 8: raise KeyError('too many for me')\n"
        "    return (z0 - z1).square().mean()\n"
    )
    code, _, err = verbs("sweep", "--set", "loss=small.py:small", *TINY)
    assert code == 1
    assert "no trial came to a result" in err


@pytest.mark.slow
def test_a_sweep_from_start_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verbs: Verbs, one_ray: None
) -> None:
    monkeypatch.chdir(tmp_path)
    done = contrasweep("sweep", *TINY, "--name", "s", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["state"] == "finished"
    assert sum(told["trials"].values()) == 2
    assert Path(told["report"]).is_file()
    assert (tmp_path / "runs" / "s" / "report" / "leaderboard.csv").is_file()
    pictures = sorted((tmp_path / "runs" / "s" / "pictures").glob("*/views.png"))
    assert len(pictures) == told["trials"]["completed"] == 2
    assert "What was learned" in Path(told["report"]).read_text("utf-8")
    assert told["samples_seen"] == 2 * 256
    assert "Traceback" not in done.stderr

    assert "resume" in verbs.refused("sweep", *TINY, "--name", "s")

    status = verbs.json("status", "runs/s")
    assert status["state"] == "finished"
    assert status["unfinished"] == []
    assert status["best"]["trial"] == told["best"]["trial"]

    lines = (tmp_path / "runs" / "s" / "events.jsonl").read_text()
    again = verbs.json("resume", "runs/s")  # nothing is left to do
    assert again["best"] == told["best"]
    assert (tmp_path / "runs" / "s" / "events.jsonl").read_text() == lines

    assert sum(verbs.json("resume", "runs/s", "--trials", "1")["trials"].values()) == 3

    shown = verbs.told("report", "runs/s")
    assert "* the default configuration" in shown
    assert f"{told['best']['value']:.4g}" in shown

    yaml = tmp_path / "runs" / "s" / "sweep.yaml"
    was = yaml.read_text()
    yaml.write_text(was.replace("seed: 0", "seed: 1"))
    refused = verbs.refused("resume", "runs/s", "--trials", "1")
    assert "seed in sweep.yaml is 1" in refused
    yaml.write_text(was)

    (tmp_path / "runs" / "s").rename(tmp_path / "runs" / "moved")
    assert f"{told['best']['value']:.4g}" in verbs.told("report", "runs/moved")
    (tmp_path / "runs" / "moved").rename(tmp_path / "runs" / "s")

    with monkeypatch.context() as dead:
        dead.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        verbs.told("report", "runs/s")  # recorded in the embedded store, whatever the variable says

    best = told["best"]["trial"]
    repeated = verbs.json("train", "--from", "runs/s", "--trial", best, "--out", "again")
    for figure in ("knn_top1", "train_loss", "rankme", "alignment", "uniformity"):
        assert repeated["metrics"][figure] == repeated["recorded"][figure]

    from_yaml = verbs.json("sweep", "--config", "runs/s/sweep.yaml", "--name", "t")
    assert from_yaml["best"]["value"] == told["best"]["value"]

    own_page = (tmp_path / "runs" / "s" / "report" / "index.html").read_bytes()
    both = verbs.json("report", "runs/s", "runs/t")
    assert list(both["leaderboards"]) == ["s", "t"]
    assert Path(both["report"]).parent.name == "with-t"
    assert (tmp_path / "runs" / "s" / "report" / "index.html").read_bytes() == own_page


@pytest.mark.parametrize(
    "arguments",
    [["status", "nothing"], ["resume", "nothing"], ["report", "nothing"],
     ["train", "--from", "nothing", "--trial", "0"], ["train", "--from", "nothing"],
     ["train", "--set", "encoder=nope"], ["train", "--dataset", "cifar10"],
     ["train", "--epochs", "0.1", "--out", "/proc/x"], ["sweep", "--out", "/proc/x"]],
)  # fmt: skip
def test_other_verbs_name_what_is_wrong(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verbs: Verbs
) -> None:
    monkeypatch.chdir(tmp_path)
    verbs.refused(*arguments)
    assert written(tmp_path) == []
