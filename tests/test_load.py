from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from analysis.frames import TABLES
from analysis.load import (
    CURVE_COLUMNS,
    DECISION_COLUMNS,
    RUNG_METRICS,
    TRIAL_COLUMNS,
    load_sweep,
    load_sweeps,
    with_metrics,
)
from analysis.store import Store, first_line, without_credentials
from search import uris as search_uris


def test_info_is_typed(recorded):
    info = recorded.info
    assert (info["name"], info["state"], info["objective"]) == ("planted", "finished", "knn_top1")
    assert (info["total_images"], info["train_images"], info["val_images"]) == (4_000, 1_000, 400)
    assert info["rungs"] == (1_000, 2_000)
    assert (info["slots"], info["reduction"], info["wall_s"]) == (2, 3.0, 700.5)
    assert info["versions"] == {"contrasweep": "0.1.0", "torch": "2.0"}
    assert info["config"]["note"] == "<b>&"
    assert info["start"] == pd.Timestamp(1_760_000_000_000, unit="ms", tz="UTC")


def test_one_row_a_trial_with_its_state(recorded):
    trials = recorded.trials.set_index("number")
    assert list(recorded.trials.columns[: len(TRIAL_COLUMNS)]) == list(TRIAL_COLUMNS)
    assert list(trials.index) == list(range(14))
    assert trials.loc[[0, 4, 11, 12, 13], "state"].tolist() == [
        *("completed", "pruned", "diverged", "oom", "unfinished")
    ]
    assert trials.index[trials["is_default"]].tolist() == [0]
    assert trials.loc[4, "rung"] == 1_000
    assert pd.isna(trials.loc[0, "rung"])
    assert trials.loc[10, "samples_seen"] == 4_024
    assert trials.loc[10, "mark"] == 4_000
    assert trials.loc[8, "wall_s"] == pytest.approx(2_024 / 50)
    assert trials.loc[12, "samples_seen"] == 0
    assert math.isnan(trials.loc[11, "objective"])
    assert pd.isna(trials.loc[13, "end"])


def test_searched_parameters_have_their_types(recorded):
    assert recorded.parameters == ["batch_size", "loss", "lr", "temperature", "margin"]
    trials = recorded.trials
    assert trials["param.batch_size"].dtype == "Int64"
    assert trials["param.lr"].dtype == "float64"
    assert set(trials["param.loss"]) == {"nt_xent", "margin"}
    drawn = trials["param.margin"].notna()
    assert drawn.tolist() == (trials["param.loss"] == "margin").tolist()


def test_curves_are_tidy(sweep_store):
    curves = load_sweep(sweep_store, "planted", metrics="all").curves
    assert list(curves.columns) == list(CURVE_COLUMNS)
    assert set(curves["metric"]) == {"knn_top1", "train_loss", "wall_s", "images_per_s"}
    one = curves[(curves["number"] == 8) & (curves["metric"] == "train_loss")]
    assert one["mark"].tolist() == [500, 1_000, 1_500, 2_000]
    assert one["samples_seen"].tolist() == [524, 1_024, 1_524, 2_024]
    assert one["value"].tolist() == [4.875, 4.75, 4.625, 4.5]
    assert curves["time"].is_monotonic_increasing


def test_decisions_are_one_row_a_rung_reached(recorded):
    decisions = recorded.decisions
    assert list(decisions.columns) == list(DECISION_COLUMNS)
    assert len(decisions) == 11 + 7
    stopped = decisions[decisions["stop"]]
    assert stopped[["number", "mark"]].to_numpy().tolist() == [
        *([4, 1_000], [5, 1_000], [6, 1_000], [7, 1_000], [8, 2_000], [9, 2_000])
    ]
    first = decisions[(decisions["number"] == 0) & (decisions["mark"] == 2_000)].iloc[0]
    assert math.isnan(first["cutoff"])
    assert first["competitors"] == 1


def test_of_histories_only_those_asked_for_are_read(sweep_store, monkeypatch):
    asked = {}
    read = Store.histories

    def noted(store, run_ids, metric):
        asked[metric] = len(run_ids)
        return read(store, run_ids, metric)

    monkeypatch.setattr(Store, "histories", noted)
    frames = load_sweep(sweep_store, "planted")
    assert set(frames.curves["metric"]) == {"knn_top1"}
    reporting = len(frames.trials) - 1  # trial 12 ran out of memory before its first report
    decided = 11  # whose decisions are metrics, as in records from before the tag
    assert asked == {"knn_top1": reporting, **dict.fromkeys(RUNG_METRICS, decided)}
    asked.clear()
    more = with_metrics(frames, ["train_loss"])
    assert asked == {"train_loss": len(frames.trials)}
    assert set(more.curves["metric"]) == {"knn_top1", "train_loss"}
    asked.clear()
    assert with_metrics(more, ["train_loss", "knn_top1"]) is more
    assert not asked


def test_an_unknown_metric_lists_the_known(sweep_store):
    known = "images_per_s, knn_top1, train_loss, wall_s; got 'mark'"
    with pytest.raises(ValueError, match=f"metric must be one of {known}"):
        load_sweep(sweep_store, "planted", metrics=["mark"])


def test_several_sweeps_come_in_the_order_asked_for(sweep_store, record_sweep, fake_trial):
    record_sweep("second", [fake_trial(0, "completed", {"lr": 1e-3}, [0.5])])
    both = load_sweeps(sweep_store, ["second", "planted"])
    assert [frames.info["name"] for frames in both] == ["second", "planted"]


def test_newest_of_one_name_unless_an_id_is_given(sweep_store, record_sweep, fake_trial):
    trial = fake_trial(0, "completed", {"lr": 1e-3}, [0.5])
    newer = record_sweep("twice", [trial, fake_trial(1, None, {})], t0_ms=1_770_000_000_000)
    older = record_sweep("twice", [trial], t0_ms=1_760_000_000_000)
    assert load_sweep(sweep_store, "twice").info["sweep_id"] == newer
    frames = load_sweep(sweep_store, "twice", sweep_id=older)
    assert (frames.info["sweep_id"], len(frames.trials)) == (older, 1)
    with pytest.raises(ValueError, match="no sweep 'twice' with id 'x'"):
        load_sweep(sweep_store, "twice", sweep_id="x")


def test_infinities_come_back_from_an_sql_store(sweep_store, record_sweep, fake_trial):
    record_sweep("infinite", [fake_trial(0, None, {"lr": 1e-3}, [0.1, math.inf])])
    frames = load_sweep(sweep_store, "infinite")
    values = frames.curves[frames.curves["metric"] == "knn_top1"].sort_values("mark")["value"]
    assert values.tolist() == [0.1, math.inf]


def test_the_client_reads_what_the_tables_hold(sweep_store, record_sweep, fake_trial, monkeypatch):
    values = [0.1, math.inf, -math.inf, math.nan]
    record_sweep("no numbers", [fake_trial(0, None, {"lr": 1e-3}, values)])
    by_table = load_sweeps(sweep_store, ["planted", "no numbers"], metrics="all")
    monkeypatch.setattr("analysis.store.tables_of", lambda uri: None)
    by_client = load_sweeps(sweep_store, ["planted", "no numbers"], metrics="all")
    for one, other in zip(by_table, by_client, strict=True):
        for name in TABLES:
            pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name))


def test_a_sweep_without_trials_has_empty_frames(sweep_store, record_sweep):
    record_sweep("empty", [], state="running")
    frames = load_sweep(sweep_store, "empty")
    assert (len(frames.trials), len(frames.curves), len(frames.decisions)) == (0, 0, 0)
    assert frames.parameters == []


def test_unknown_sweep_lists_those_there(sweep_store):
    with pytest.raises(ValueError, match=r"no sweep 'nope' in .*; sweeps there: .*planted"):
        load_sweep(sweep_store, "nope")


def test_a_missing_store_is_an_error_and_is_not_created(tmp_path):
    with pytest.raises(ValueError, match="no tracking store at"):
        load_sweep(f"sqlite:///{tmp_path / 'mlflow.db'}", "any")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_stores_are_errors_of_one_line(tmp_path):
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"no database at all" * 100)
    for uri in (
        f"sqlite:///{garbage}",
        f"file://{tmp_path}",
        str(tmp_path),
        "http://user:secret@127.0.0.1:9",
    ):
        with pytest.raises(ValueError, match="track") as caught:
            load_sweep(uri, "any")
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:secret@host:5000/x",
        "postgresql://h/db?user=me&password=secret&sslmode=require",
        "sqlite:////a/b.db",
    ],
)
def test_no_text_shows_the_credentials_of_a_uri(uri):
    shown = without_credentials(uri)
    assert shown == search_uris.without_credentials(uri)
    assert first_line(OSError(f"request to {uri} failed\nhere")) == f"request to {shown} failed"


def test_what_answers_but_speaks_no_http_is_an_error_of_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with server.accept()[0] as asked:
                asked.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"cannot reach tracking server {uri}: SSH-2.0"):
            load_sweep(uri, "any")
        thread.join()


def test_analysis_imports_no_other_room_and_no_heavy_library():
    code = (
        "import sys, json, analysis, analysis.plots, analysis.effects;"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    loaded = set(json.loads(done.stdout))
    assert "analysis" in loaded
    assert not loaded & {"torch", "ray", "trainer", "search", "spaces", "mlflow", "optuna"}


def test_last_values_by_metric_without_a_history(sweep_store):
    last = load_sweep(sweep_store, "planted", metrics=()).last
    assert last.index.name == "number"
    assert list(last.columns) == ["images_per_s", "knn_top1", "train_loss", "wall_s"]
    assert (last.dtypes == "float64").all()
    assert last.loc[8, "train_loss"] == 4.5
    assert last.loc[[11, 12], "knn_top1"].isna().all()  # diverged; no report at all
