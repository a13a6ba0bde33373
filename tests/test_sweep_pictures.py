"""Pictures at a sweep's end and on its page: made, recorded, read back, or noted as missing."""

import io
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from analysis.artifacts import parse_pictures
from analysis.frames import SweepFrames
from analysis.page import Figures, render
from analysis.pictures import SweepPictures, load_pictures, map_figure, pictures_section
from search import Sweep, SweepConfig
from search import pictures as made
from search.journal import load_state
from search.pictures import make_pictures, pictured_trials
from search.state import SweepState, TrialState
from search.storage import Folder
from tests.extent import long
from trainer.checkpoint import save_checkpoint
from trainer.config import TrainConfig
from trainer.datasets import DataSplits, load_for
from trainer.loop import Trainer

FILES = ["about.json", "map.json", "neighbours.json", "neighbours.png", "views.png"]


# ---- at a sweep's end


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return load_for(TrainConfig(train_limit=100, val_limit=60))


@pytest.fixture(scope="module")
def checkpoint(data: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an encoder that saw nothing yet, which is as good to look at."""
    config = TrainConfig(train_limit=100, val_limit=60, batch_size=32)
    path = tmp_path_factory.mktemp("saved") / "checkpoint.pt"
    save_checkpoint(path, Trainer(config, data).state_dict(), config, 100)
    return path


class Ended:
    """A sweep in a folder whose trials have ended: what `make_pictures` is given of it."""

    def __init__(self, folder: Path, data: DataSplits, saved: Path, values: list[float]) -> None:
        self.folder, self.notes = folder, list[str]()
        self.plan: Any = SimpleNamespace(config=SweepConfig(), data=data)
        self.storage = Folder(folder)
        self.driver: Any = SimpleNamespace(
            draining=None,
            journal=SimpleNamespace(state=SweepState()),
            ending=lambda: {"state": "finished", "reason": "", "why": ""},
        )
        for number, value in enumerate(values):
            self.add(number, value, saved)

    def add(self, number: int, value: float, saved: Path) -> TrialState:
        trial = TrialState(number, {}, {}, {}, {}, False, 0.0)
        trial.reports[100] = {"samples_seen": 100, "metrics": {"knn_top1": value}}
        trial.state, trial.checkpoint = "completed", f"trials/{number}/checkpoint_100"
        self.driver.journal.state.trials[number] = trial
        (self.folder / trial.checkpoint).mkdir(parents=True)
        (self.folder / trial.checkpoint / "checkpoint.pt").symlink_to(saved)
        return trial

    def make(self) -> list[int] | None:
        """Make them; the numbers in the index, each with all its files, None without one."""
        make_pictures(self.folder, self.plan, self.driver, self.storage, self.notes.append)
        pictures = self.folder / "pictures"
        if not (pictures / "index.json").exists():
            return None
        numbers: list[int] = json.loads((pictures / "index.json").read_text())["trials"]
        folders = {path.name for path in pictures.iterdir() if path.is_dir()}
        assert folders == {f"trial-{number}" for number in numbers}
        for name in folders:
            assert sorted(path.name for path in (pictures / name).iterdir()) == FILES
        return numbers


@pytest.fixture
def ended(tmp_path: Path, data: DataSplits, checkpoint: Path) -> Callable[[list[float]], Ended]:
    return lambda values: Ended(tmp_path, data, checkpoint, values)


def test_the_three_best_trials_have_pictures(ended: Callable[[list[float]], Ended]) -> None:
    sweep = ended([0.5, 0.9, 0.7, 0.8])
    assert sweep.make() == [1, 3, 2]
    assert sweep.notes == []
    about = json.loads((sweep.folder / "pictures/trial-3/about.json").read_text())
    expected = {"trial": 3, "mark": 100, "objective": "knn_top1", "value": 0.8, "images": 60}
    assert expected.items() <= about.items()
    threads = {thread.name for thread in threading.enumerate()}
    assert "pictures" not in threads

    sweep.add(4, 0.95, (sweep.folder / "trials/0/checkpoint_100/checkpoint.pt").resolve())
    assert sweep.make() == [4, 1, 3]


def test_only_completed_trials_with_checkpoints_count(
    ended: Callable[[list[float]], Ended],
) -> None:
    sweep = ended([0.5, 0.9, 0.7, 0.8])
    trials = sweep.driver.journal.state.trials
    trials[1].state, trials[3].checkpoint = "pruned", None
    assert [t.number for t in pictured_trials(sweep.driver.journal.state, SweepConfig())] == [2, 0]
    del trials[0], trials[2]
    assert sweep.make() is None
    assert sweep.notes == []


def test_lower_is_better_of_a_loss(ended: Callable[[list[float]], Ended]) -> None:
    state = ended([0.5, 0.9, 0.7]).driver.journal.state
    for trial in state.trials.values():
        trial.reports[100]["metrics"]["val_loss"] = trial.value("knn_top1")
    config = SweepConfig(objective="val_loss")
    assert [trial.number for trial in pictured_trials(state, config)] == [0, 2, 1]


def test_checkpoints_that_are_gone_or_damaged_cost_a_note(
    ended: Callable[[list[float]], Ended],
) -> None:
    sweep = ended([0.9, 0.8, 0.7])
    shutil.rmtree(sweep.folder / "trials/0")
    damaged = sweep.folder / "trials/1/checkpoint_100/checkpoint.pt"
    damaged.unlink()
    damaged.write_bytes(b"no archive")
    assert sweep.make() == [2]
    assert "no pictures of trial 0: its checkpoint" in sweep.notes[0]
    assert "is gone" in sweep.notes[0]
    assert "no pictures of trial 1: ValueError: checkpoint" in sweep.notes[1]
    assert len(sweep.notes) == 2


@pytest.mark.parametrize(
    ("option", "ending", "draining", "expected"),
    [
        (True, ("finished", ""), None, [0]),
        (True, ("interrupted", "budget"), None, [0]),
        (True, ("interrupted", "asked"), None, None),
        (True, ("finished", ""), "stopped by SIGINT", None),
        (False, ("finished", ""), None, None),
    ],
)
def test_only_a_sweep_that_came_to_its_end_has_pictures(
    ended: Callable[[list[float]], Ended],
    option: bool,
    ending: tuple[str, str],
    draining: str | None,
    expected: list[int] | None,
) -> None:
    sweep = ended([0.5])
    sweep.plan.config = SweepConfig(pictures=option)
    sweep.driver.ending = lambda: {"state": ending[0], "reason": "", "why": ending[1]}
    sweep.driver.draining = draining
    assert sweep.make() == expected


def test_what_hangs_is_left_behind(
    ended: Callable[[list[float]], Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, thaw = ended([0.9, 0.8]), threading.Event()
    monkeypatch.setattr(made, "LIMIT_S", 0.3)

    class Hanging(Folder):
        def opened(self, name: str) -> Any:
            thaw.wait(30)
            return super().opened(name)

    sweep.storage = Hanging(sweep.folder)
    started = time.monotonic()
    assert sweep.make() is None
    assert time.monotonic() - started < 5
    assert sweep.notes == ["no further pictures: they took more than 0.3 s"]
    thaw.set()
    (thread,) = (each for each in threading.enumerate() if each.name == "pictures")
    thread.join(10)
    assert not thread.is_alive()
    assert not (sweep.folder / "pictures").exists()


def test_a_folder_that_cannot_be_written_costs_a_note(
    ended: Callable[[list[float]], Ended],
) -> None:
    sweep = ended([0.9])
    (sweep.folder / "pictures").write_text("in the way")
    sweep.make()
    assert len(sweep.notes) == 1
    assert sweep.notes[0].startswith("no further pictures: ")


def test_what_was_made_before_the_disk_was_full_is_kept(
    ended: Callable[[list[float]], Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ended([0.9, 0.8])
    original = made.write_atomically

    def full(path: Path, content: str | bytes) -> None:
        if path.parent.name == "trial-1" and path.name == "views.png":
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(made, "write_atomically", full)
    assert sweep.make() == [0]
    assert sweep.notes == ["no further pictures: [Errno 28] No space left on device"]


def test_pictures_of_an_earlier_end_stay_where_there_are_no_new_ones(
    ended: Callable[[list[float]], Ended],
) -> None:
    sweep = ended([0.9])
    assert sweep.make() == [0]
    shutil.rmtree(sweep.folder / "trials")
    assert sweep.make() == [0]
    assert len(sweep.notes) == 1


# ---- read back


@pytest.fixture(scope="module")
def files(
    data: DataSplits, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """One trial's, as a sweep makes them."""
    sweep = Ended(tmp_path_factory.mktemp("sweep"), data, checkpoint, [0.75])
    assert sweep.make() == [0]
    folder = sweep.folder / "pictures/trial-0"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def uploaded(
    sweep_store: str, tmp_path: Path, files: dict[str, bytes], request: pytest.FixtureRequest
) -> tuple[MlflowClient, str, Path]:
    """A run with the pictures of trial 0: the client, the run's id, and where they lie."""
    client = MlflowClient(sweep_store)
    name = f"pictures of {request.node.name}"
    experiment = client.create_experiment(name, (tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    local = tmp_path / "pictures" / "trial-0"
    local.mkdir(parents=True)
    for each, content in files.items():
        (local / each).write_bytes(content)
    client.log_artifacts(run_id, str(tmp_path / "pictures"), "pictures")
    client.set_tag(run_id, "contrasweep.pictures", "[0]")
    return client, run_id, tmp_path / "artifacts" / run_id / "artifacts" / "pictures" / "trial-0"


def test_pictures_come_back_as_they_were_made(
    sweep_store: str, uploaded: tuple[MlflowClient, str, Path], files: dict[str, bytes]
) -> None:
    _, run_id, _ = uploaded
    found = load_pictures(sweep_store, run_id)
    assert found.notes == ()
    (trial,) = found.trials
    assert trial.neighbours_png == files["neighbours.png"]
    assert trial.views_png == files["views.png"]
    assert trial.maps.model_dump(mode="json") == json.loads(files["map.json"])
    assert (trial.about.trial, trial.about.value, trial.about.images) == (0, 0.75, 60)


def damage(files: dict[str, bytes], name: str, **changes: Any) -> bytes:
    return json.dumps({**json.loads(files[name]), **changes}).encode()


def twice(files: dict[str, bytes]) -> bytes:
    return damage(files, "map.json", maps=json.loads(files["map.json"])["maps"] * 2)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("views.png", lambda files: b"GIF89a" + bytes(90), "views.png is no PNG file"),
        ("views.png", lambda files: bytes(5 << 20), "views.png has 5,242,880 bytes, more than"),
        ("map.json", lambda files: b"{", "map.json is damaged"),
        ("map.json", lambda files: damage(files, "map.json", labels=[99] * 60), "outside the 10"),
        ("map.json", twice, "map.json is damaged: it has two maps of one method"),
        ("map.json", lambda files: damage(files, "map.json", labels=[1]), "different lengths"),
        (
            "about.json",
            lambda files: damage(files, "about.json", format=2),
            "made by another version",
        ),
        ("about.json", lambda files: damage(files, "about.json", mark="x"), "is damaged: mark Inp"),
        ("about.json", lambda files: damage(files, "about.json", trial=3), "is of trial 3"),
        (
            "neighbours.json",
            lambda files: damage(files, "neighbours.json", cosine=[]),
            "different lengths",
        ),
    ],
)
def test_what_is_broken_is_left_out_with_a_note(
    uploaded: tuple[MlflowClient, str, Path],
    files: dict[str, bytes],
    name: str,
    content: Callable[[dict[str, bytes]], bytes],
    why: str,
) -> None:
    client, run_id, folder = uploaded
    (folder / name).write_bytes(content(files))
    found = load_pictures(client, run_id)
    assert found.trials == ()
    (note,) = found.notes
    assert note.startswith("pictures of trial 0 left out: ")
    assert why in note
    assert "\n" not in note


def test_one_trial_of_two_may_be_missing(uploaded: tuple[MlflowClient, str, Path]) -> None:
    client, run_id, _ = uploaded
    client.set_tag(run_id, "contrasweep.pictures", "[7, 0]")
    found = load_pictures(client, run_id)
    assert [trial.about.trial for trial in found.trials] == [0]
    assert found.notes == ("pictures of trial 7 left out: they are not in the store",)
    for damaged in ("[0", "0", "[Infinity]", "[1e999]", "[true]", "[-1]", "[" * 7_000):
        client.set_tag(run_id, "contrasweep.pictures", damaged)
        assert "is damaged" in load_pictures(client, run_id).notes[0]
    client.delete_tag(run_id, "contrasweep.pictures")
    assert load_pictures(client, run_id) == SweepPictures()


def test_a_store_of_artifacts_that_refuses_costs_a_note(
    uploaded: tuple[MlflowClient, str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run_id, _ = uploaded

    class ClientError(Exception):
        """As botocore's, which is no OSError."""

    def refuse(self: MlflowClient, run_id: str, path: str) -> None:
        raise ClientError("ExpiredToken at s3://me:secret@bucket")

    monkeypatch.setattr(MlflowClient, "list_artifacts", refuse)
    note = "pictures of trial 0 left out: ExpiredToken at s3://bucket"
    assert load_pictures(client, run_id) == SweepPictures(notes=(note,))


def test_artifacts_of_another_machine_cost_one_line(
    uploaded: tuple[MlflowClient, str, Path],
) -> None:
    client, run_id, folder = uploaded
    shutil.rmtree(folder.parents[2])
    found = load_pictures(client, run_id)
    assert found.trials == ()
    (note,) = found.notes
    assert note.startswith("The pictures of this sweep cannot be read from here: they lie in ")
    section = pictures_section(found, Figures(), "s0")
    assert section == {"trials": [], "notes": [note], "overtaken_by": []}


# ---- on the page


def section(
    pictures: SweepPictures, frames: SweepFrames | None = None
) -> tuple[dict[str, Any], Figures, str]:
    figures = Figures()
    found = pictures_section(pictures, figures, "s0", frames)
    assert found is not None
    page = render("pictures.html.j2", figures, s={"pictures": found})
    return found, figures, page


def test_the_page_shows_map_neighbours_and_views(files: dict[str, bytes]) -> None:
    other = {**files, "about.json": damage(files, "about.json", trial=4, value=0.5)}
    both = SweepPictures((parse_pictures(files), parse_pictures(other)), ("a <note>",))
    _, figures, page = section(both)
    assert list(figures.drawn) == ["s0-map-0-pca", "s0-map-4-pca"]
    traces = figures.drawn["s0-map-0-pca"]["data"]
    assert [trace["name"] for trace in traces] == [str(digit) for digit in range(10)]
    styles = {(trace["marker"]["color"], trace["marker"]["symbol"]) for trace in traces}
    assert len(styles) == len({symbol for _, symbol in styles}) == 10
    assert sum(len(trace["x"]) for trace in traces) == 60
    assert "n = 60 of 60 validation images, a marker each, as the encoder conv_small sees" in page
    assert "a &lt;note&gt;" in page
    assert "trial 0: knn_top1 0.75, trial 4: knn_top1 0.5" in page
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == 4
    assert page.count("image-rendering:pixelated") == page.count('loading="lazy"') == 4
    near = json.loads(files["neighbours.json"])
    same = sum(label == row[0] for row in near["labels"] for label in row[1:])
    assert f"{same} of 48 are of the same class" in page
    assert page.count("✓ <") == 2 * same
    assert page.count("✕ <") == 2 * (48 - same)
    assert "crop 100%, flip 50%, jitter 80%, grayscale 20%" in page
    assert "crops of at least 20% of the area" in page
    width, height = Image.open(io.BytesIO(files["views.png"])).size
    assert f'width="{width}" height="{height}"' in page


def test_pictures_of_an_earlier_end_are_not_called_the_best(
    files: dict[str, bytes], recorded: SweepFrames
) -> None:
    """The sweep goes on after its end: trial 10 leads by now."""

    def told(number: int) -> str:
        of = {**files, "about.json": damage(files, "about.json", trial=number)}
        return section(SweepPictures((parse_pictures(of),)), recorded)[2]

    assert "Encoders of the best completed trial (trial 10: " in told(10)
    assert "The best by now" not in told(10)
    assert "of a completed trial that was among the best when these pictures" in told(0)
    assert "The best by now: trial 10.</p>" in told(0)


def test_without_pictures_there_is_no_part() -> None:
    assert pictures_section(None, Figures(), "s0") is None
    assert pictures_section(SweepPictures(), Figures(), "s0") is None
    assert not render("pictures.html.j2", Figures(), s={"pictures": None}).strip()


def test_without_labels_nothing_is_named(files: dict[str, bytes]) -> None:
    near = json.loads(files["neighbours.json"])
    unlabelled = {
        **files,
        "map.json": damage(files, "map.json", labels=None, classes=[]),
        "neighbours.json": damage(files, "neighbours.json", labels=None, classes=[]),
    }
    _, figures, page = section(SweepPictures((parse_pictures(unlabelled),)))
    drawn = figures.drawn["s0-map-0-pca"]
    assert len(drawn["data"]) == 1
    assert drawn["layout"]["showlegend"] is False
    assert "frame" not in page
    assert "✓" not in page
    assert f"image {near['rows'][0]}" in page


def test_of_many_classes_ten_are_named(files: dict[str, bytes]) -> None:
    rng = np.random.default_rng(0)
    labels = sorted([*rng.integers(12, 40, 30).tolist(), *(number % 10 for number in range(30))])
    names = [f"<i>{number}</i>" for number in range(40)]
    many = parse_pictures({**files, "map.json": damage(files, "map.json", labels=labels,
                                                       classes=names)})  # fmt: skip
    figure = map_figure(many.maps.maps[0], many.maps, many.about)
    others, *named = figure.data
    assert others.name == "other classes"
    assert others.marker.colorscale
    assert len(named) == 10
    assert sum(len(trace.x) for trace in figure.data) == 60
    assert min(len(trace.x) for trace in named) >= 2
    assert all(trace.name.startswith("&lt;i&gt;") for trace in named)
    assert all(text.startswith("&lt;i&gt;") for text in others.text)
    classes = [(trace.meta, name) for trace in figure.data for name in trace.customdata]
    assert sorted(name for _, name in classes) == sorted(names[label] for label in labels)
    assert {meta for meta, _ in classes} == {("class",)}
    _, _, page = section(SweepPictures((many,)))
    assert f"Named are the 10 most frequent of {len(set(labels))} classes." in page
    assert "<i>" not in page.split("<script")[0].replace("<i>●", "")


def test_the_axes_say_what_they_hold(files: dict[str, bytes]) -> None:
    maps = json.loads(files["map.json"])["maps"]
    umap = {**maps[0], "method": "umap", "explained": None}
    trial = parse_pictures({**files, "map.json": damage(files, "map.json", maps=[*maps, umap])})
    pca, second = trial.maps.maps
    figure = map_figure(pca, trial.maps, trial.about)
    share = f"{maps[0]['explained'][1]:.0%}"
    assert figure.layout.yaxis.title.text == f"PCA 2, {share} of the variance"
    assert map_figure(second, trial.maps, trial.about).layout.xaxis.title.text == "UMAP 1"
    _, figures, page = section(SweepPictures((trial,)))
    assert list(figures.drawn) == ["s0-map-0-pca", "s0-map-0-umap"]
    assert "gaps between groups and their sizes mean little" in page


# ---- whole sweeps on Ray


@long
@pytest.mark.slow
def test_a_sweep_ends_with_pictures_of_its_best_trials(tmp_path: Path, one_ray: None) -> None:
    """Again when it is extended, and well when the best trial's checkpoint is gone by then."""
    notes: list[str] = []
    config = SweepConfig(
        name="s", out=str(tmp_path / "runs"), trials=2, epochs=1, train_limit=200, val_limit=80,
        scheduler="none", sampler="random", max_concurrent=1,
        fixed={"batch_size": 64, "image_size": 16, "linear_probe": "never"},
    )  # fmt: skip
    sweep = Sweep(config, on_note=notes.append)
    assert sweep.run().state == "finished"
    assert notes == []

    client = MlflowClient(sweep.tracking_uri)
    experiment = client.get_experiment_by_name("contrasweep")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`contrasweep.kind` = 'sweep'")
    state = load_state(sweep.dir / "events.jsonl")
    best = [trial.number for trial in pictured_trials(state, config)]
    assert sorted(best) == [0, 1]
    for number in best:
        listed = client.list_artifacts(run.info.run_id, f"pictures/trial-{number}")
        assert sorted(Path(each.path).name for each in listed) == FILES
    found = load_pictures(sweep.tracking_uri, run.info.run_id)
    assert [trial.about.trial for trial in found.trials] == best
    for trial in found.trials:
        assert trial.about.value == state.trials[trial.about.trial].value("knn_top1")

    gone = state.trials[best[0]].checkpoint
    assert gone is not None
    shutil.rmtree(sweep.dir / gone)
    again = Sweep.open(sweep.dir, on_note=notes.append)
    assert again.resume(trials=2).state == "finished"
    state = load_state(sweep.dir / "events.jsonl")
    wanted = [trial.number for trial in pictured_trials(state, config)]
    found = load_pictures(sweep.tracking_uri, run.info.run_id)
    assert [trial.about.trial for trial in found.trials] == [n for n in wanted if n != best[0]]
    assert found.notes == ()
    assert any(trial.about.trial >= 2 for trial in found.trials)
    expected = [best[0]] if best[0] in wanted else []
    assert len(notes) == len(expected)
    assert all(f"no pictures of trial {best[0]}" in note for note in notes)
