"""The page in a browser, on desktop and phone: errors, requests, widths, keys, tables, data.

Pages of odd and of large sweeps are read as markup, which needs no browser.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.frames import SweepFrames
from analysis.page import Figures, embedded
from analysis.plots import best_so_far_figure, learning_curves
from analysis.progress import progress_section
from analysis.report import write_report
from analysis.tables import leaderboard
from analysis.thinning import MAX_CURVES, MAX_DOTS, changes, sample, shares, thin_curve
from tests.browser import Browser, find_chromium
from tests.built_sweeps import built, large
from tests.pages import Markup

needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """Two sweeps on one page: one of 150 trials and 8 parameters, and a small one.

    Without ranges no importance is computed, which takes seconds.
    """
    first = large(150)
    first = dataclasses.replace(first, info={**first.info, "distributions": {}})
    states = ["completed"] * 9 + ["diverged", "oom", "unfinished"]
    margin = [None if i % 3 else 0.1 * i for i in range(12)]
    second = built(
        [0.9 - 0.02 * i for i in range(12)],
        states=states,
        reports=[8] * 9 + [2, 1, 3],
        params={"lr": [1e-5 * 3**i for i in range(12)], "margin": margin},
        default=3,
        name="small",
    )
    return write_report([first, second], folder / "report")


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Browser]:
    with Browser(folder / "profile") as browser:
        yield browser


OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"
SETTLE = "new Promise(done => setTimeout(done, 300))"
ROWS = "Array.from(document.querySelectorAll('#s0-board tbody tr'), r => r.cells[%s].textContent)"


@needs_chromium
def test_the_page_loads_without_errors_requests_or_sideways_scrolling(
    browser: Browser, page: Path
) -> None:
    before = len(browser.requests), len(browser.messages)
    browser.open(page, dark=True)
    browser.evaluate(OPEN_ALL)
    for width in (1200, 1120, 768, 360):
        browser.resize(width, 12_000)  # every figure comes near the window and is drawn
        browser.evaluate(SETTLE)
        wide = browser.evaluate("document.documentElement.scrollWidth")
        assert wide == browser.evaluate("innerWidth") == width
        if width == 1200:
            boxes = (
                "Array.from(document.querySelectorAll('%s'), b => b.scrollWidth - b.clientWidth)"
            )
            assert browser.evaluate(boxes % ".board .box") == [0, 0]
    # a table that goes on to the right fades there, until it is scrolled to its end
    fades = "Array.from(document.querySelectorAll('.box'), b => b.classList.contains('on'))"
    wider = "Array.from(document.querySelectorAll('.box'), b => b.scrollWidth > b.clientWidth + 1)"
    assert any(browser.evaluate(fades))
    assert browser.evaluate(fades) == browser.evaluate(wider)
    browser.evaluate("document.querySelectorAll('.box').forEach(b => b.scrollLeft = 9999)")
    browser.evaluate(SETTLE)
    assert not any(browser.evaluate(fades))
    asked = [url for url in browser.requests[before[0] :] if not url.startswith("data:")]
    assert asked == [page.as_uri()]
    assert browser.messages[before[1] :] == []


@needs_chromium
def test_figures_are_as_wide_as_their_place_once_opened(browser: Browser, page: Path) -> None:
    browser.open(page, 1200)
    undrawn = "document.querySelectorAll('#s1-effects .plot svg').length"
    assert browser.evaluate(undrawn) == 0
    browser.evaluate("location.hash = '#s1-effects'")
    browser.evaluate(SETTLE)
    assert browser.evaluate("document.getElementById('s1-effects').open")
    gaps = """Array.from(document.querySelectorAll('#s1-effects .plot'))
      .filter(p => p.querySelector('svg'))
      .map(p => Math.abs(p.querySelector('svg').getBoundingClientRect().width - p.clientWidth))"""
    found = browser.evaluate(gaps)
    assert found
    assert max(found) < 2
    # closed, then another width, then opened again
    browser.evaluate("document.getElementById('s1-effects').open = false")
    browser.resize(700)
    browser.evaluate("document.getElementById('s1-effects').open = true")
    browser.evaluate(SETTLE)
    assert max(browser.evaluate(gaps)) < 2
    # printed: as wide as the sheet's columns at once, and back again
    browser.resize(1200)
    browser.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert browser.evaluate("document.querySelector('main').clientWidth") == 700
    assert max(browser.evaluate(gaps)) < 2
    browser.evaluate("dispatchEvent(new Event('afterprint'))")
    assert browser.evaluate("document.querySelector('main').clientWidth") > 1000
    browser.evaluate(SETTLE)
    assert max(browser.evaluate(gaps)) < 2


@needs_chromium
def test_the_browser_shows_the_leaderboard_as_python_does(browser: Browser, page: Path) -> None:
    browser.open(page)
    markup = Markup(page.read_text("utf-8"))
    assert len(markup.boards()["s0-board"]["cells"][0]) == 150
    shown = browser.evaluate(
        "Array.from(document.querySelectorAll('#s0-board tbody tr'), r => Array.from(r.cells,"
        " c => c.className + ':' + c.textContent.replace(/\\s+/g, ' ').trim()))"
    )
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    without = browser.evaluate(
        "Array.from(document.querySelectorAll('#s0-board tbody tr'), r => Array.from(r.cells,"
        " c => c.className + ':' + c.textContent.replace(/\\s+/g, ' ').trim()))"
    )
    assert len(without) == 100
    assert len(shown) == 50
    assert shown == without[:50]


@needs_chromium
def test_the_leaderboard_is_sorted_paged_and_filtered(browser: Browser, page: Path) -> None:
    browser.open(page)
    frames = large(150)
    ranked = leaderboard(frames)["number"].tolist()
    status = "document.querySelector('#s0-board [role=status]').textContent"
    click = "Array.from(document.querySelectorAll('#s0-board .bar button'))[%d].click()"
    browser.evaluate("document.getElementById('s0-leaderboard').open = true")
    assert [int(n) for n in browser.evaluate(ROWS % 0)] == ranked[:50]
    browser.evaluate(click % 1)
    assert [int(n) for n in browser.evaluate(ROWS % 0)] == ranked[50:100]
    assert browser.evaluate(status) == "Rows 51 to 100 of 150"
    # by the keyboard: the heading of the learning rate, twice
    browser.evaluate("document.querySelectorAll('#s0-board .sort')[3].focus()")
    browser.press("Enter")
    heading = "document.querySelectorAll('#s0-board thead th')[3].getAttribute('aria-sort')"
    assert browser.evaluate(heading) == "ascending"
    by_lr = frames.trials.sort_values("param.lr")["number"].tolist()
    assert [int(n) for n in browser.evaluate(ROWS % 0)] == by_lr[:50]
    browser.press(" ")
    assert browser.evaluate(heading) == "descending"
    assert [int(n) for n in browser.evaluate(ROWS % 0)] == by_lr[::-1][:50]
    write = """(text => { const f = document.querySelector('#s0-board .filter');
      f.value = text; f.dispatchEvent(new Event('input')); })"""
    browser.evaluate(write + "('17')")
    assert browser.evaluate(ROWS % 0) == ["17"]
    browser.evaluate(write + "('out of mem')")
    out = frames.trials.loc[frames.trials["state"] == "oom", "number"]
    assert sorted(int(n) for n in browser.evaluate(ROWS % 0)) == sorted(out)
    browser.evaluate(write + "('nothing')")
    assert browser.evaluate(status) == "No trial matches."


@needs_chromium
def test_missing_values_stand_last_whichever_way_a_table_is_sorted(
    browser: Browser, page: Path
) -> None:
    browser.open(page)
    rows = ROWS.replace("s0", "s1")
    columns = browser.evaluate(
        "Array.from(document.querySelectorAll('#s1-board thead th'), c => c.textContent)"
    )
    at = columns.index("margin")
    for _ in range(2):
        browser.evaluate(f"document.querySelectorAll('#s1-board .sort')[{at}].click()")
        values = browser.evaluate(rows % at)
        known = [value != "–" for value in values]
        assert known == sorted(known, reverse=True)
        assert known.count(True) == 4
    # a plain table: images of the failed trials, sorted by what stands behind "1,024"
    failed = "document.querySelectorAll('#s1-failed %s')"
    browser.evaluate((failed % ".sort") + "[2].click()")
    numbers = "Array.from(%s, r => Number(r.cells[2].dataset.sort))" % (failed % "tbody tr")
    values = browser.evaluate(numbers)
    assert values == sorted(values)
    assert len(values) == 2


@needs_chromium
def test_data_are_saved_as_csv(browser: Browser, page: Path, folder: Path) -> None:
    target = folder / "downloads"
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(target))
    browser.open(page)
    browser.evaluate("document.querySelector('[data-csv=s0-curves]').click()")
    browser.evaluate("document.querySelector('#s0-board .bar button:last-child').click()")
    end = time.monotonic() + 20
    names = {"of 150, small-s0-curves.csv", "of 150, small-s0-board.csv"}
    while not names <= {path.name for path in target.glob("*")}:
        assert time.monotonic() < end, list(target.glob("*"))
        time.sleep(0.05)
    time.sleep(0.1)
    text = (target / "of 150, small-s0-curves.csv").read_text("utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == [
        *("series", "trial", "images seen by the trial", "knn_top1 (higher is better)")
    ]
    drawn = learning_curves(large(150))
    points = sum(y is not None for trace in drawn.data for y in trace.y)
    assert len(rows) == points
    text = (target / "of 150, small-s0-board.csv").read_text("utf-8")
    board = list(csv.DictReader(io.StringIO(text)))
    table = leaderboard(large(150))
    assert [int(row["trial"]) for row in board] == table["number"].tolist()
    assert [float(row["lr"]) for row in board] == pytest.approx(table["param.lr"].tolist())
    assert board[0]["state"] == "completed winner"


@needs_chromium
def test_packed_arrays_and_maps_have_their_data_too(browser: Browser, folder: Path) -> None:
    import base64

    import numpy as np
    import plotly.graph_objects as go

    packed = np.array([[1.5, 2.5], [3.5, -4.0]])
    figures = Figures()
    figure = go.Figure(layout={"height": 300, "xaxis": {"title": {"text": "a &amp; b"}}})
    figure.add_heatmap(x=["p", 'q"'], y=np.array([1, 2]), z=packed, name="gain")
    figures.add("map", figure)
    assert base64.b64decode(figures.drawn["map"]["data"][0]["z"]["bdata"]) == packed.tobytes()
    scripts = (Path(__file__).parent.parent / "analysis/templates/page.js").read_text("utf-8")
    html = f"""<title>t</title><div id="map" class="plot"></div>
      <script type="application/json" id="figures">{embedded(figures.drawn)}</script>
      <script type="application/json" id="themes">{{}}</script>
      <script>var Plotly = {{react: () => 0}};</script><script>{scripts}</script>"""
    (folder / "map.html").write_text(html, encoding="utf-8")
    browser.open(folder / "map.html")
    assert browser.evaluate("contrasweep.table('map')") == [
        ["series", "a & b", "y", "gain"],
        ["gain", "p", 1, 1.5],
        ["gain", 'q"', 1, 2.5],
        ["gain", "p", 2, 3.5],
        ["gain", 'q"', 2, -4],
    ]
    assert browser.evaluate("contrasweep.csv([['a,b', 'q\"']])") == '"a,b","q"""\r\n'
    cells = "[['=1+1', '-x', '@a,b', '-0.5', -2, 'a=b']]"  # no text is a formula
    assert browser.evaluate(f"contrasweep.csv({cells})") == "'=1+1,'-x,\"'@a,b\",-0.5,-2,a=b\r\n"


def test_figures_have_labels_and_parts_have_anchors(page: Path) -> None:
    markup = Markup(page.read_text("utf-8"))
    labels = [v for t, n, v in markup.attributes if t == "div" and n == "aria-label"]
    plots = [v for t, n, v in markup.attributes if n == "role" and v == "img"]
    assert len(plots) == len(markup.figures())
    assert any(label.startswith("Learning curves. Each line is a trial") for label in labels)
    ids = {value for _, name, value in markup.attributes if name == "id"}
    links = {v[1:] for t, n, v in markup.attributes if t == "a" and n == "href"}
    assert links <= ids
    assert {"content", "s0-leaderboard", "s1-progress", "s1-about"} <= links


def odd_sweeps() -> dict[str, SweepFrames]:
    return {
        "running": built(
            [0.5, 0.4, 0.3], states=["completed", "pruned", "unfinished"], state="running"
        ),
        "empty": built([], state="running"),
        "one": built([0.5]),
        "failed": built([math.nan] * 3, states=["oom", "error", "lost"], reports=[0, 0, 0]),
        "equal": built([0.5] * 12),
        "not finite": built([math.inf, 0.5, -math.inf, math.nan], reports=[8] * 4),
        "behind early": behind_early(),
    }


def behind_early(default: float = 0.5) -> SweepFrames:
    """The default was stopped at 1,000 images, where the later winner had 0.3."""
    frames = built(
        [0.9, default, 0.6],
        states=["completed", "pruned", "completed"],
        curve=[0.2, 1 / 3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0],
        default=1,
    )
    frames.curves.loc[frames.curves["number"] == 1, "value"] = default
    return frames


@pytest.mark.parametrize("kind", list(odd_sweeps()))
def test_odd_sweeps_have_sensible_pages(kind: str, tmp_path: Path) -> None:
    markup = Markup(write_report(odd_sweeps()[kind], tmp_path).read_text("utf-8"))
    text = " ".join(markup.text.split())
    told = {
        "running": "This sweep is still running",
        "empty": "No trial has started",
        "one": "one completed trial is no search",
        "failed": "3 of 3 ended trials failed (1 out of memory, 1 error and 1 lost)",
        "equal": "11 of the 11 other completed trials lie within two standard errors",
        "not finite": "Trial 1 won with knn_top1 0.5000",
        "behind early": "The winner was 9.3 standard errors of the difference worse than the "
        "default at 1,000 images, where the default was stopped early: more than chance",
    }
    assert told[kind] in text
    assert "The gain over the default" not in text
    assert "nan" not in text.lower().split()
    assert "None" not in text.replace("None.", "").split()


def test_figures_of_ten_thousand_trials_are_thinned_and_say_so() -> None:
    frames = large(10_000, names=3)
    figures = Figures()
    captions = {item["id"]: item["caption"] for item in progress_section(frames, figures, "s0")}
    assert len(embedded(figures.drawn)) < 1.5e6
    dots = figures.drawn["s0-best-time"]["data"][0]
    assert len(dots["x"]) == MAX_DOTS
    assert "Of the dots, 2,000 are drawn, chosen at random" in captions["s0-best-cost"]
    assert "About 200 of the 10,000 curves are drawn" in captions["s0-curves"]
    curves = [trace for trace in learning_curves(frames).data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in curves) == MAX_CURVES + 1
    assert [trace.name.split(" (")[0] for trace in curves][:3] == [
        *("failed", "stopped early", "completed")
    ]
    assert curves[-1].name.startswith("winner")


def test_cost_is_in_gpu_hours_where_the_gpus_are_known() -> None:
    values = [0.4, 0.5, 0.6]
    slots = best_so_far_figure(built(values), "cost")
    assert slots.layout.xaxis.title.text == "slot-minutes, all trials together"
    assert max(slots.data[0].x) == pytest.approx(3 * 80 / 60)
    gpus = best_so_far_figure(built(values, config={"gpus_per_trial": "0.5"}), "cost")
    assert gpus.layout.xaxis.title.text == "GPU-minutes, all trials together"
    assert max(gpus.data[0].x) == pytest.approx(3 * 80 / 60 / 2)


def test_thinning_keeps_what_matters() -> None:
    import pandas as pd

    assert shares({"a": 3, "b": 5_000, "c": 100}, 60) == {"a": 3, "c": 28, "b": 29}
    assert sum(shares({"a": 3, "b": 4}, 60).values()) == 7
    assert sample(range(5), 9) == [0, 1, 2, 3, 4]
    kept = sample(range(1_000), 50)
    assert kept == sorted(set(kept)) == sample(range(1_000), 50)
    assert len(kept) == 50
    x = pd.Series([1.0, 2, 3, 4, 5])
    line = changes(x, pd.Series([math.nan, 0.1, 0.1, 0.3, 0.3]))
    assert line["x"].tolist() == [2, 4, 5]
    rows = thin_curve(pd.DataFrame({"x": range(1_000)}), 10)["x"].tolist()
    assert (rows[0], rows[-1], len(rows)) == (0, 999, 10)


def test_boards_hold_what_json_can(tmp_path: Path) -> None:
    values: dict[str, list[Any]] = {"crop": [(0.1, 1.0), None], "lr": [math.inf, 1e-3]}
    markup = Markup(write_report(built([0.5, 0.4], params=values), tmp_path).read_text("utf-8"))
    cells = json.dumps(markup.boards()["s0-board"]["cells"])
    assert '"(0.1, 1.0)"' in cells
    assert '"inf"' in cells
