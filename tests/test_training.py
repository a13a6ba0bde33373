"""The page of one run's learning curves."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.training import training_figures, write_curves

REPORTS = pd.DataFrame(
    {
        "mark": [100, 200, 300],
        "samples_seen": [128, 256, 384],
        "epoch": [1.28, 2.56, 3.84],
        "train_loss": [5.0, 4.5, 4.2],
        "knn_top1": [0.5, 0.7, 0.6],
        "linear_top1": [None, None, 0.65],
        "alignment": [0.5, 0.4, 0.3],
        "uniformity": [-1.0, -1.5, -2.0],
        "rankme": [10.0, 20.0, 30.0],
        "feature_std": [0.5, 0.6, 0.7],
        "lr": [0.001, 0.001, 0.0],
        "wall_s": [1.0, 2.0, 3.0],
    }
)


def test_every_measure_is_drawn_once_and_the_best_is_marked() -> None:
    figures = training_figures(REPORTS)
    drawn = {trace.name: trace for figure in figures.values() for trace in figure.data}
    assert set(drawn) == {*REPORTS.columns[3:11], "best kNN 0.7000"}
    assert list(drawn["knn_top1"].y) == [0.5, 0.7, 0.6]
    assert list(drawn["linear_top1"].y) == [0.65]  # only where it was measured
    best = drawn["best kNN 0.7000"]
    assert (best.x[0], best.y[0]) == (2.56, 0.7)


def test_a_constant_is_not_drawn_around_nothing() -> None:
    figure = training_figures(REPORTS.assign(lr=0.001))["learning rate"]
    assert list(figure.layout.yaxis.range) == pytest.approx([0, 0.0011])


def test_without_labels_the_accuracies_are_left_out() -> None:
    figures = training_figures(REPORTS.assign(knn_top1=None, linear_top1=None))
    assert not [title for title in figures if "accuracy" in title]
    names = {trace.name for figure in figures.values() for trace in figure.data}
    assert not names & {"knn_top1", "linear_top1"}


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<b>&run"
    folder.mkdir()
    REPORTS.to_csv(folder / "metrics.csv", index=False)
    page = write_curves(folder / "metrics.csv", folder / "curves.html").read_text("utf-8")
    assert "&lt;b&gt;&amp;run" in page
    assert "<b>&run" not in page
    assert "Reports: 3; 384 images, 3.8 epochs" in page
    assert page.count("Plotly.newPlot(") >= 6
    assert "<script src=" not in page
    assert not list(folder.glob(".*"))


def test_a_run_without_a_report_has_no_curves(tmp_path: Path) -> None:
    REPORTS.head(0).to_csv(tmp_path / "metrics.csv", index=False)
    with pytest.raises(ValueError, match="has no report yet"):
        write_curves(tmp_path / "metrics.csv", tmp_path / "curves.html")
