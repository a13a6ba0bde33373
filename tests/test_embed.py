"""Features of a folder in one file: right, whole after any death, refused in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from trainer import feature_parts
from trainer.config import TrainConfig
from trainer.embed import Embedded, _find, _MarkedFiles, embed_folder
from trainer.export import fingerprint, load_encoder, save_encoder
from trainer.images import read_image
from trainer.models import build_encoder

PART = 16
SIZE = 16
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ROOT = Path(__file__).parent.parent


def saved_encoder(folder: Path, seed: int) -> Path:
    """A folder with an encoder in it, untrained."""
    config = TrainConfig(encoder="conv_small", image_size=SIZE)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, width = build_encoder(config.encoder, SIZE)
    save_encoder(
        folder / "encoder.safetensors",
        encoder,
        config=config,
        feature_dim=width,
        mean=MEAN,
        std=STD,
        classes=("a", "b"),
    )
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_encoder(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_encoder(tmp_path_factory.mktemp("other"), 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 images in folders of several depths, two corrupt ones, and what is no image."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(66):
        place = folder / ("cat" if number % 3 else "dog/small") / f"{number:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(place)
    for name in ("top.JPG", "train/a.jpeg", "test/ä ö.webp", "zebra.d/x.y.bmp"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(folder / name)
    whole = (folder / "train/a.jpeg").read_bytes()
    (folder / "cat/020x.jpg").write_bytes(whole[:300])
    (folder / "dog/zero.png").write_bytes(b"")
    (folder / "labels.csv").write_text("a,b\n")
    (folder / "cat/notes.txt").write_text("no image")
    (folder / "odd.png").symlink_to(folder / "nowhere")
    (folder / "again").symlink_to(folder / "cat")
    (folder / ".thumbs").mkdir()
    (folder / ".thumbs/x.png").write_bytes(b"hidden")
    (folder / "cat/.hidden.png").write_bytes(b"hidden")
    return folder


Run = Callable[..., Embedded]


@pytest.fixture
def run(model: Path, pictures: Path, tmp_path: Path) -> Run:
    def embed(**changes: Any) -> Embedded:
        given = {"model": model, "folder": pictures, "out": tmp_path / "features.parquet"} | changes
        positional = [given.pop(name) for name in ("model", "folder", "out")]
        return embed_folder(
            *positional, **{"workers": 0, "part_images": PART, "batch_size": 6} | given
        )

    return embed


def metadata(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(pq.read_schema(path).metadata[b"contrasweep"])
    return about


def test_rows_are_the_features_of_the_same_pixels(run: Run, pictures: Path, model: Path) -> None:
    done = run(workers=2)
    frame = pd.read_parquet(done.out)
    expected = sorted(
        (str(path.relative_to(pictures)) for path in pictures.rglob("[!.]*.*") if path.is_file()),
        key=lambda name: name.split("/"),
    )
    left_out = ("labels.csv", "notes.txt", "020x.jpg", "zero.png")
    expected = [name for name in expected if not name.endswith(left_out) and name[0] != "."]
    assert list(frame.file) == expected
    assert len(expected) == done.rows == 70
    encoder = load_encoder(model)
    pixels = np.stack([read_image(str(pictures / name), SIZE) for name in frame.file])
    features = np.stack(list(frame.features))
    assert features.dtype == np.float32
    assert features.std(axis=0).max() > 0.001
    np.testing.assert_allclose(features, encoder.features(pixels), rtol=1e-4, atol=1e-6)
    classes = dict(zip(frame.file, frame["class"], strict=True))
    assert pd.isna(classes.pop("top.JPG"))
    assert classes == {name: name.split("/")[0] for name in classes}
    # without a copy to numpy, and whole in memory nowhere but here
    column = pq.read_table(done.out)["features"].combine_chunks()
    np.testing.assert_array_equal(column.flatten().to_numpy().reshape(len(frame), -1), features)


def test_the_file_says_what_it_is_of(run: Run, pictures: Path, model: Path) -> None:
    done = run()
    about = metadata(done.out)
    encoder = load_encoder(model)
    assert about["encoder"] == {
        "digest": fingerprint(encoder),
        "name": "conv_small",
        "image_size": SIZE,
        "feature_dim": encoder.feature_dim,
        "mean": list(MEAN),
        "std": list(STD),
        "config": encoder.config.model_dump(mode="json"),
    }
    assert (about["images"], about["rows"], about["folder"]) == (72, 70, str(pictures))
    corrupt, others = about["skipped"]["corrupt"], about["skipped"]["not_images"]
    assert corrupt["count"] == 2
    assert [each["file"] for each in corrupt["first"]] == ["cat/020x.jpg", "dog/zero.png"]
    assert "truncated" in corrupt["first"][0]["why"].lower()
    assert corrupt["first"][1]["why"] == "it is no image"
    assert {each["file"]: each["why"] for each in others["first"]} == {
        "again": "a link to a folder, not followed",
        "cat/notes.txt": "no image by its name",
        "labels.csv": "no image by its name",
        "odd.png": "no file",
    }
    assert done.corrupt.to_json() == corrupt
    assert sorted(path.name for path in done.out.parent.iterdir()) == ["features.parquet"]


def test_no_more_than_a_hundred_are_named() -> None:
    skipped = feature_parts.Skipped()
    for number in range(60):
        skipped.add(str(number), "why")
    more = feature_parts.Skipped(70, [{"file": "x", "why": ""}] * 70)
    skipped.extend(more)
    assert (skipped.count, len(skipped.first)) == (130, 100)


KILLED = """
import sys
from pathlib import Path
from trainer.embed import embed_folder

def wait_in_third_part(done, total):
    print(done, flush=True)
    if done > 2 * 16:
        sys.stdin.read()

model, folder, out = map(Path, sys.argv[1:])
embed_folder(model, folder, out, workers=2, part_images=16, batch_size=6,
             progress=wait_in_third_part)
"""


def test_a_killed_run_goes_on_where_it_was(
    run: Run, model: Path, pictures: Path, tmp_path: Path
) -> None:
    whole = run(out=tmp_path / "whole.parquet").out
    out = tmp_path / "features.parquet"
    command = [sys.executable, "-c", KILLED, str(model), str(pictures), str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:  # type: ignore[call-overload]
        for line in process.stdout:
            if int(line) > 2 * PART:
                break
        with pytest.raises(ValueError, match=r"another process works on .*; wait for it"):
            run()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    parts = tmp_path / "features.parquet.parts"
    assert sorted(path.name for path in parts.glob("part-*")) == [
        "part-000000.parquet",
        "part-000001.parquet",
    ]
    assert not out.exists()
    # what a death amid writing leaves, and a part that a full disk cut off
    (parts / f".part-000002.parquet.{16 * 'a'}").write_bytes(b"torn")
    (tmp_path / f".features.parquet.{16 * 'b'}").write_bytes(b"torn")
    (parts / "part-000003.parquet").write_bytes((parts / "part-000001.parquet").read_bytes()[:99])
    told: list[tuple[int, int]] = []
    done = run(progress=lambda *now: told.append(now), part_images=5)  # the plan's size holds
    assert done.continued == 2 * PART
    assert told[:2] == [(32, 72), (38, 72)]
    assert told[-1] == (72, 72)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, whole.name]


class Died(BaseException):
    pass


def begun(run: Run, **changes: Any) -> None:
    """A run that ends in its second part."""

    def die(done: int, total: int) -> None:
        if done > PART:
            raise Died

    with pytest.raises(Died):
        run(progress=die, **changes)


def test_parts_of_another_encoder_or_folder_are_not_gone_on_with(
    run: Run, model: Path, other_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for number in range(3 * PART):
        image = Image.new("RGB", (SIZE, SIZE), (number, 5 * number, 99))
        image.save(folder / f"{number:02}.png")
    begun(run, folder=folder)
    with pytest.raises(ValueError, match=r"encoder .* is not the one that .* add --force"):
        run(folder=folder, model=other_model)
    os.utime(folder / "03.png", ns=(1, 1))
    with pytest.raises(ValueError, match=r"images below .* are not those that .* add --force"):
        run(folder=folder)
    assert (tmp_path / "features.parquet.parts/part-000000.parquet").exists()
    done = run(folder=folder, model=other_model, force=True)
    assert done.continued == 0
    assert metadata(done.out)["encoder"]["digest"] == fingerprint(load_encoder(other_model))
    with pytest.raises(ValueError, match=r"exists; add --force to replace it"):
        run(folder=folder)
    before = done.out.read_bytes()
    begun(run, folder=folder, force=True)
    assert done.out.read_bytes() == before  # until the new one is whole
    assert run(folder=folder, force=True).continued == PART
    assert done.out.read_bytes() != before


def test_a_run_that_did_nothing_leaves_nothing(run: Run, tmp_path: Path) -> None:
    def die(done: int, total: int) -> None:
        raise Died

    with pytest.raises(Died):
        run(progress=die)
    assert not any(tmp_path.iterdir())


def test_files_of_others_are_left_alone(run: Run, tmp_path: Path) -> None:
    parts = tmp_path / "features.parquet.parts"
    parts.mkdir()
    (parts / "part-000000.parquet").write_bytes(b"of another program")
    with pytest.raises(ValueError, match=r"holds files of others, such as part-000000.parquet"):
        run(force=True)
    assert (parts / "part-000000.parquet").read_bytes() == b"of another program"
    (parts / "plan.json").write_text('{"images": 3')
    with pytest.raises(ValueError, match="of no use to this version; remove them"):
        run(force=True)


def test_the_output_is_written_in_groups(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_parts, "_GROUP_ROWS", 30)
    done = run()
    groups = pq.ParquetFile(done.out).metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [31, 32, 7]


def test_an_output_among_the_images_is_none_of_them(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for number in range(2 * PART):
        Image.new("RGB", (SIZE, SIZE), (number, 0, 99)).save(folder / f"{number:02}.png")
    link = tmp_path / "link"
    link.symlink_to(folder)
    out = link / "features.parquet"
    begun(run, folder=folder, out=out)
    done = run(folder=folder, out=out)
    assert (done.continued, done.rows, done.not_images.count) == (PART, 2 * PART, 0)
    assert run(folder=folder, out=out, force=True).not_images.count == 0


def test_a_file_that_is_gone_is_marked(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (SIZE, SIZE), (1, 2, 3)).save(tmp_path / f"{name}.png")
    found = _find(tmp_path, set())
    files = _MarkedFiles(
        found.folder, found.names, np.zeros(2, np.int64), SIZE, np.zeros(2, np.uint8)
    )
    (tmp_path / "a.png").unlink()
    images, stand_ins = files.read(np.array([0, 1]))
    assert not stand_ins
    assert images[1, :, 0, 0].tolist() == [1, 2, 3]
    assert files.marks_N.tolist() == [2, 0]
    assert files.why(0) == "gone, or not permitted to read"


def test_features_that_are_not_finite_are_refused(run: Run, tmp_path: Path) -> None:
    encoder = load_encoder(saved_encoder(tmp_path / "bad", 0))
    with torch.no_grad():
        next(encoder.encoder.parameters()).fill_(torch.nan)
    save_encoder(
        tmp_path / "bad/encoder.safetensors",
        encoder.encoder,
        config=encoder.config,
        feature_dim=encoder.feature_dim,
        mean=MEAN,
        std=STD,
        classes=(),
    )
    with pytest.raises(ValueError, match=r"features of 'cat/001\.png' are not finite"):
        run(model=tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


# ---------------------------------------------------------------------- the command line


def test_the_verb_tells_people_and_programs(
    verbs: Any, model: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "features.parquet"
    command = ("embed", model / "encoder.safetensors", pictures, "--out", out, "--workers", 0)
    code, told, err = verbs(*command)
    assert code == 0
    assert "  cat/020x.jpg: " in told
    assert "skipped other files: 4" in told
    assert " features in " in told
    assert told.startswith("skipped unreadable images: 2")
    assert told.splitlines()[-1].startswith("70 rows of ")
    assert err == ""
    assert "exists; add --force" in verbs.refused(*command)
    answer = verbs.json(*command, "--force", "--batch-size", 9, "--device", "cpu")
    assert (answer["out"], answer["rows"], answer["continued"]) == (str(out), 70, 0)
    assert answer["skipped"] == metadata(out)["skipped"]
    assert answer["encoder_digest"] == metadata(out)["encoder"]["digest"]
    assert answer["images_per_s"] > 0
    assert 0 < answer["wall_s"] < 60


def test_mistakes_are_one_line(verbs: Any, model: Path, pictures: Path, tmp_path: Path) -> None:
    empty, texts, broken, sweep = made = [
        tmp_path / n for n in ("empty", "texts", "broken", "sweep")
    ]
    for folder in made:
        folder.mkdir()
    (sweep / "events.jsonl").touch()
    (texts / "a.txt").write_text("a")
    (broken / "a.png").write_text("a")
    out = tmp_path / "features.parquet"

    def refused(folder: Path = pictures, at: Path = model, to: Path = out) -> str:
        line: str = verbs.refused("embed", at, folder, "--out", to, "--workers", 0)
        return line

    assert "'a.csv'; rename it" in refused(to=Path("a.csv"))
    assert "does not exist; give a folder of images" in refused(tmp_path / "none")
    assert "is a file; give a folder of images" in refused(texts / "a.txt")
    assert "holds no file; expected .bmp" in refused(empty)
    assert "holds no image among its 1 files; expected .bmp" in refused(texts)
    assert "can be read; the first is 'a.png': it is no image" in refused(broken)
    assert "does not exist or is no file" in refused(at=tmp_path / "none")
    assert "is a sweep, not an encoder; export one by 'contrasweep export" in refused(at=sweep)
    assert "device must be auto, cpu" in verbs.refused(
        "embed", model, pictures, "--out", out, "--device", "tpu"
    )
    for size in (0, 513):
        assert f"must be in [1, 512], got {size}" in verbs.refused(
            "embed", model, pictures, "--out", out, "--batch-size", size
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty", "sweep", "texts"]


def test_progress_is_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from search.embed_verb import EmbedDisplay

    now = 0.0
    console = Console(force_terminal=False, width=100)
    with EmbedDisplay(console, clock=lambda: now) as display:
        display(1_000, 9_000)
        for done in range(1_250, 9_001, 250):
            now += 1
            display(done, 9_000)
    assert capsys.readouterr().out.splitlines() == [
        "going on: 1,000 of 9,000 images are done",
        "    3,500 of 9,000 images  250/s  0:22 left",
        "    6,000 of 9,000 images  250/s  0:12 left",
        "    8,500 of 9,000 images  250/s  0:02 left",
    ]
    with EmbedDisplay(Console(force_terminal=True, width=100), clock=lambda: now) as display:
        display(0, 9_000)
        display(4_500, 9_000)
    assert "4500/9000" in capsys.readouterr().out
