"""The report that a sweep ends with, and that of several: what is told, and where pages go."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from search import mistakes, reporting
from search.run import Sweep
from tests.built_results import result as built_result
from tests.built_sweeps import built


def folders(*names: str) -> Any:
    return [SimpleNamespace(dir=Path("runs") / name) for name in names]


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep's folder is PLACE/NAME; its id has the first letter of PLACE. Pages are not drawn."""

    def opened(directory: Path) -> Any:
        place, name = directory.parts
        frames = built([0.5, 0.4], name=name, sweep_id=place[0])
        config = SimpleNamespace(name=name, objective="knn_top1")
        return SimpleNamespace(dir=directory, config=config, tracking_uri="", frames=frames)

    monkeypatch.setattr(Sweep, "open", opened)
    monkeypatch.setattr(reporting, "read_back", lambda sweep: sweep.frames)
    monkeypatch.setattr("analysis.artifacts.load_pictures", lambda uri, run_id: None)
    monkeypatch.setattr("analysis.confirmation.read_confirmations", lambda uri, sweep_id: None)
    monkeypatch.setattr("search.advice.advise", lambda frames: None)
    monkeypatch.setattr("analysis.write_report", lambda frames, folder, **more: folder / "p")


def test_sweeps_of_one_name_are_told_apart_by_their_folders(sweeps: None) -> None:
    told = CliRunner().invoke(reporting.reporting, ["a/x", "b/x", "c/y", "--json"])
    assert list(json.loads(told.stdout)["leaderboards"]) == ["a/x", "b/x", "y"]
    assert all(len(board) == 2 for board in json.loads(told.stdout)["leaderboards"].values())
    told = CliRunner().invoke(reporting.reporting, ["a/x", "b/x"])
    assert (told.exit_code, told.stdout.count("0.5")) == (0, 2)
    assert "\na/x\n" in told.stdout
    assert "\nb/x\n" in told.stdout


def test_a_sweep_given_twice_is_refused(sweeps: None) -> None:
    with pytest.raises(ValueError, match="each sweep must be given once, got 'x' twice"):
        CliRunner().invoke(reporting.reporting, ["a/x", "along/x"], catch_exceptions=False)


def test_pages_on_several_sweeps_have_a_folder_of_their_own() -> None:
    def named(*names: str) -> str:
        return reporting.pages_folder(folders(*names)).relative_to("runs/s/report").as_posix()

    assert named("s") == "."
    assert named("s", "t") == "with-t"
    assert named("s", "a", "b") == "with-a+b"
    lists = [("a-b",), ("a", "b"), ("a+b",), ("b", "a"), ("b+a",), ("a+b", "c"), ("a", "b+c")]
    many = [f"quick-20260101-00000{n}" for n in range(12)]
    lists += [tuple(many[:6]), tuple(many[6:]), ("é" * 125,)]
    places = [named("s", *names) for names in lists]
    assert len(set(places)) == len(places)
    assert max(len(place.encode()) for place in places) <= reporting.MAX_FOLDER_BYTES
    assert named("s", *many).startswith("with-12-more-")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "runs/s/report"), "runs/s/report: No space left"),
        (ValueError("cannot record at\nhttp://x."), "no report: cannot record at http://x; make"),
    ],
)
def test_a_report_that_fails_costs_a_sweep_no_result(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = built_result(best={"trial": 0, "value": 0.5, "params": {}}, trials={"completed": 1})

    def fails(sweeps: Any) -> Any:
        raise error

    monkeypatch.setattr(reporting, "make_report", fails)
    for as_json in (True, False):
        reporting.conclude(folders("s")[0], result, as_json)
        shown = capsys.readouterr()
        if as_json:
            assert json.loads(shown.out)["report"] is None
            assert json.loads(shown.out)["best"] == result.best
        else:
            assert "best: trial 0" in " ".join(shown.out.split())
        assert told in " ".join(shown.err.split())
        assert "make it by: contrasweep report runs/s" in " ".join(shown.err.split())


def test_a_mistake_does_not_name_the_library_that_found_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise typer.BadParameter("Value error, 'x' is not one of 'a', 'b'.")

    app: Any = refused
    with pytest.raises(SystemExit) as ended:
        mistakes.run_app(app)
    assert ended.value.code == 2
    assert "Invalid value: 'x' is not one of 'a', 'b'; see" in capsys.readouterr().err
