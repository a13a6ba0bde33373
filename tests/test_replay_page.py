"""The page of a replay: what its table and figures show of given rows."""

import re
from pathlib import Path
from typing import Any

from analysis.replay import regret_figure, survival_figure, write_replay

ABOUT = {
    **{"name": "s", "objective": "knn_top1", "trials": 4, "in_full": 4, "failed": 0},
    **{"stopped": 0, "workers": 1, "shuffles": 30, "train_images": 100},
}


def setting(scheduler: str, grace: float, reduction: int | None, **more: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"scheduler": scheduler, "grace": grace, "reduction": reduction}
    plain |= {"brackets": 1, "rungs": [100, 200], "moved": False, "images": 900.0}
    for measure, value in (("saving", 0.5), ("survival", 0.9996), ("regret", 0.0)):
        plain |= {measure: value, f"{measure}_low": value, f"{measure}_high": value}
    return plain | {"saving_at_most": 0.5, "unknown": 0.0, **more}


ROWS = [
    setting("asha", 1.0, 2),
    setting("asha", 2.0, 2),
    setting("asha", 1.0, 3),
    setting("median", 2.0, None),
]


def headings(rows: list[dict[str, Any]], folder: Path) -> list[str]:
    page = write_replay(rows, ABOUT, folder / "replay.html").read_text("utf-8")
    return re.findall(r"<th>(.*?)</th>", page)


def test_the_main_columns_stand_first(tmp_path: Path) -> None:
    main = ["scheduler", "grace, epochs", "reduction", "best survives", "saving", "regret"]
    assert headings(ROWS, tmp_path) == [*main, "rungs, epochs", "images"]
    unknown = [setting("asha", 1.0, 2, unknown=0.2, brackets=2)]
    assert headings(unknown, tmp_path) == [
        *(*main[:3], "brackets", *main[3:]),
        *("rungs, epochs", "images", "unknown", "saving at most"),
    ]


def test_what_is_only_near_to_certain_is_not_called_so(tmp_path: Path) -> None:
    page = write_replay(ROWS, ABOUT, tmp_path / "replay.html").read_text("utf-8")
    assert "<td>&gt;99.9%<small>(&gt;99.9% to &gt;99.9%)</small></td>" in page
    rows = [setting("asha", 1.0, 2, survival=0.995)]
    assert "<td>99.5%<small>" in write_replay(rows, ABOUT, tmp_path / "replay.html").read_text()


def test_a_replay_without_regret_has_an_axis_to_read_that_from() -> None:
    figure = regret_figure(ROWS, "knn_top1")
    low, high = figure.layout.yaxis.range
    assert -0.001 < low < 0 < high <= 0.01
    assert [note.text for note in figure.layout.annotations] == ["no regret in any setting"]
    some = [*ROWS, setting("asha", 4.0, 2, regret=0.1, regret_high=0.2)]
    figure = regret_figure(some, "knn_top1")
    assert (figure.layout.yaxis.range, figure.layout.annotations) == (None, ())
    unknown = [setting("asha", 1.0, 2, regret=None, regret_low=None, regret_high=None)]
    assert [n.text for n in regret_figure(unknown, "x").layout.annotations] == [
        "no regret is known"
    ]


def test_settings_are_told_by_colour_size_and_symbol_not_by_text(tmp_path: Path) -> None:
    figure = survival_figure(ROWS)
    assert {trace.mode for trace in figure.data} == {"markers"}
    two, three, median = figure.data
    assert two.marker.symbol == ("circle", "square")
    assert two.marker.color == three.marker.color != median.marker.color
    assert two.marker.size < three.marker.size
    assert "grace, epochs: 2" in two.hovertext[1]
    page = write_replay(ROWS, ABOUT, tmp_path / "replay.html").read_text("utf-8")
    legend = re.search(r'<p class="legend">(.*?)</p>', page)
    assert legend is not None
    assert re.sub(r"<[^>]+>", "", legend[1]) == (
        "● asha● median● reduction 2● reduction 3● grace 1■ grace 2"
    )
