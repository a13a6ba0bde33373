"""Exports: what is read encodes as what was written; damaged and foreign files are refused."""

from __future__ import annotations

import io
import json
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.augment import normalise
from trainer.config import TrainConfig
from trainer.export import BATCH, ExportedEncoder, fingerprint, load_encoder, save_encoder
from trainer.folder import decode_listing, list_images
from trainer.models import build_encoder, load_encoder_weights

CONFIG = TrainConfig(lr=0.0123456789, epochs=3, loss="barlow_twins", encoder="conv_small")
MEAN, STD, CLASSES = (0.1, 0.25, 1 / 3), (0.5, 0.25, 0.3), ["cat", "dog, brown", "Käse"]


def trained(config: TrainConfig = CONFIG) -> tuple[nn.Module, int]:
    """An encoder whose running statistics have left their start."""
    torch.manual_seed(5)
    encoder, feature_dim = build_encoder(config.encoder, config.image_size)
    with torch.no_grad():
        encoder(torch.rand(8, 3, config.image_size, config.image_size))
    return encoder, feature_dim


def exported(path: Path, config: TrainConfig = CONFIG) -> nn.Module:
    encoder, feature_dim = trained(config)
    save_encoder(
        path,
        encoder,
        config=config,
        feature_dim=feature_dim,
        mean=MEAN,
        std=STD,
        classes=CLASSES,
    )
    return encoder


def some_images(count: int, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "encoder.safetensors"
    exported(path)
    return path


@pytest.mark.parametrize(
    ("encoder", "size"),
    [("conv_small", 32), ("resnet18", 40), ("vit_tiny", 28), ("torchvision:squeezenet1_1", 64)],
)
def test_round_trip(tmp_path: Path, encoder: str, size: int) -> None:
    config = CONFIG.model_copy(update={"encoder": encoder, "image_size": size})
    path = tmp_path / "new" / "folder" / "encoder.safetensors"
    written = exported(path, config).eval()
    read = load_encoder(path)
    assert read.config == config
    assert (read.mean, read.std, read.classes) == (MEAN, STD, tuple(CLASSES))
    assert not read.encoder.training
    assert all(
        torch.equal(value, read.encoder.state_dict()[key])
        for key, value in written.state_dict().items()
    )
    images = some_images(5, size)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    with torch.inference_mode():
        by_hand = written((images / 255 - mean) / std)
    features = read.features(images)
    assert features.shape == (5, read.feature_dim)
    torch.testing.assert_close(features, by_hand, rtol=1e-4, atol=1e-5)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_features_do_not_depend_on_batches_or_on_the_kind_of_array(whole: Path) -> None:
    encoder = load_encoder(whole)
    images = some_images(BATCH + 3)
    features = encoder.features(images)
    assert features.dtype == torch.float32
    assert features.device.type == "cpu"
    assert len(features) == BATCH + 3
    torch.testing.assert_close(encoder.features(images[-3:]), features[-3:], rtol=1e-4, atol=1e-5)
    array = images.numpy()[::-1]
    array.flags.writeable = False
    torch.testing.assert_close(encoder.features(array), features.flip(0), rtol=1e-4, atol=1e-5)
    assert encoder.features(images[:0]).shape == (0, encoder.feature_dim)
    assert not features.requires_grad


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(2, 3, 32, 32), r"float32 \[2, 3, 32, 32\]"),
        (np.zeros((2, 3, 32, 32)), r"float64 \[2, 3, 32, 32\]"),
        (some_images(2, 16), r"uint8 \[2, 3, 16, 16\]"),
        (some_images(2)[:, :1], r"uint8 \[2, 1, 32, 32\]"),
        (some_images(1)[0], r"uint8 \[3, 32, 32\]"),
    ],
)
def test_other_images_are_refused(whole: Path, images: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"must be uint8 \[N, 3, 32, 32\], got {found}; resize"):
        load_encoder(whole).features(images)


def test_other_programs_can_read_all_of_it(whole: Path) -> None:
    with safe_open(whole, framework="np") as file:
        metadata = file.metadata()
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert metadata["encoder"] == "conv_small"
    assert metadata["image_size"] == "32"
    assert metadata["feature_dim"] == "192"
    assert json.loads(metadata["mean"]) == list(MEAN)
    assert json.loads(metadata["std"]) == list(STD)
    assert json.loads(metadata["classes"]) == CLASSES
    assert TrainConfig(**json.loads(metadata["config"])) == CONFIG
    assert weights["0.0.weight"].shape == (32, 3, 3, 3)


def test_an_export_is_a_file_of_pretrained_weights(whole: Path) -> None:
    encoder, _ = build_encoder("conv_small", 32)
    load_encoder_weights(encoder, whole)
    read = load_encoder(whole).encoder.state_dict()
    assert all(torch.equal(value, read[key]) for key, value in encoder.state_dict().items())


def test_loading_leaves_the_generator_alone(whole: Path) -> None:
    before = torch.get_rng_state()
    load_encoder(whole)
    assert torch.equal(before, torch.get_rng_state())


def test_an_export_is_readable_by_others(whole: Path) -> None:
    beside = whole.with_name("ordinary")
    beside.touch()
    assert stat.S_IMODE(whole.stat().st_mode) == stat.S_IMODE(beside.stat().st_mode)


def test_a_new_process_needs_nothing_else(whole: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from trainer.export import load_encoder;"
        "encoder = load_encoder(Path(sys.argv[1]));"
        "print(encoder.features(torch.full((2, 3, 32, 32), 7, dtype=torch.uint8)).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(whole)], capture_output=True, text=True, check=True
    )
    here = load_encoder(whole).features(torch.full((2, 3, 32, 32), 7, dtype=torch.uint8)).sum()
    assert float(done.stdout) == pytest.approx(float(here), rel=1e-4)


# ---------------------------------------------------------------------- as a module


def test_it_is_a_module_of_the_network_within(whole: Path) -> None:
    from trainer import load_encoder as public

    encoder = public(whole.parent)  # a folder that holds the file
    assert isinstance(encoder, ExportedEncoder)
    assert isinstance(encoder, nn.Module)
    assert not encoder.training
    images = some_images(4)
    batch = torch.stack([encoder.transform(image) for image in images])
    with torch.inference_mode():
        torch.testing.assert_close(encoder(batch), encoder.features(images), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"takes normalised float images, got torch\.uint8; use"):
        encoder(images)
    again, width = build_encoder("conv_small", 32)
    assert width == encoder.feature_dim
    again.load_state_dict({k.partition(".")[2]: v for k, v in encoder.state_dict().items()})
    before = encoder.encoder.state_dict()["0.0.weight"].clone()
    encoder.train()
    encoder(batch).square().mean().backward()
    torch.optim.SGD(encoder.parameters(), lr=1.0).step()
    assert not torch.equal(before, encoder.encoder.state_dict()["0.0.weight"])


def test_fingerprints_tell_encoders_apart(whole: Path, tmp_path: Path) -> None:
    prints = {fingerprint(load_encoder(whole))}
    exported(tmp_path / "again.safetensors")
    assert {fingerprint(load_encoder(tmp_path / "again.safetensors"))} == prints
    for changes in ({"mean": "[0.1, 0.2, 0.3]"}, {"classes": "[]"}):
        prints.add(
            fingerprint(load_encoder(rewritten(whole, tmp_path / "x.safetensors", **changes)))
        )
    changed = load_encoder(whole)
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    assert len(prints | {fingerprint(changed)}) == 4


# ---------------------------------------------------------------------- pictures


def pictures_of_many_kinds(folder: Path) -> list[Path]:
    """Files such as folders have: sizes, modes, orientations, transparency."""
    rng = np.random.default_rng(3)
    folder.mkdir()
    noise = rng.integers(0, 256, (90, 130, 3), dtype=np.uint8)
    colour = Image.fromarray(noise).resize((260, 181), Image.Resampling.BICUBIC)
    colour.save(folder / "large.jpg", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(folder / "turned.jpg", exif=exif)
    colour.save(folder / "turned.png", exif=exif)
    colour.convert("CMYK").save(folder / "print.jpg")
    colour.convert("L").save(folder / "grey.png")
    alpha = colour.convert("RGBA")
    alpha.putalpha(colour.convert("L"))
    alpha.save(folder / "clear.png")
    colour.convert("P").save(folder / "palette.png", transparency=7)
    deep = np.asarray(colour.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    colour.resize((32, 32)).save(folder / "exact.png")
    colour.resize((1, 50)).save(folder / "thin.png")
    colour.resize((20, 11)).save(folder / "small.gif")
    return sorted(folder.iterdir())


def test_transform_resizes_as_training_on_a_folder_does(whole: Path, tmp_path: Path) -> None:
    paths = pictures_of_many_kinds(tmp_path / "pictures")
    listing = list_images(tmp_path / "pictures", classes="ignored")
    trained_on, corrupt = decode_listing(listing, image_size=32, cache_dir=tmp_path / "cache")
    assert [name.decode() for name in listing.names] == [path.name for path in paths]
    assert not corrupt
    encoder = load_encoder(whole)
    expected = encoder.features(trained_on)
    for how in ("path", "opened", "opened again"):
        images = []
        for path in paths:
            if how == "path":
                images.append(encoder.transform(path))
                continue
            with Image.open(path) as opened:
                before = (opened.size, opened.mode)
                images.append(encoder.transform(opened))
                assert (opened.size, opened.mode) == before
                if how == "opened again":  # the user's image is as it was
                    images[-1] = encoder.transform(opened)
        batch = torch.stack(images)
        assert torch.equal(batch, normalise(torch.from_numpy(np.array(trained_on)), MEAN, STD))
        with torch.inference_mode():
            torch.testing.assert_close(encoder(batch), expected, rtol=1e-5, atol=1e-6)


def test_transform_of_pixels_is_that_of_their_picture(whole: Path, tmp_path: Path) -> None:
    transform = load_encoder(whole).transform
    with Image.open(pictures_of_many_kinds(tmp_path / "pictures")[1]) as opened:
        array = np.asarray(opened.convert("RGB")).transpose(2, 0, 1)
    image = Image.fromarray(array.transpose(1, 2, 0))
    expected = transform(image)
    assert expected.shape == (3, 32, 32)
    assert expected.dtype == torch.float32
    for pixels in (array, torch.from_numpy(array.copy()), array[::1]):
        assert torch.equal(transform(pixels), expected)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), expected)
    square = some_images(1)[0]
    assert torch.equal(transform(square), normalise(square[None], MEAN, STD)[0])
    assert transform.pixels(square).dtype == np.uint8


def test_wrong_pictures_are_refused_in_one_line(whole: Path, tmp_path: Path) -> None:
    transform = load_encoder(whole).transform
    (tmp_path / "text.jpg").write_text("no image")
    whole_jpeg = pictures_of_many_kinds(tmp_path / "pictures")[4].read_bytes()
    cut = Image.open(io.BytesIO(whole_jpeg[: len(whole_jpeg) // 2]))
    wrong: list[tuple[Any, str]] = [
        (torch.zeros(3, 8, 8), r"uint8 pixels \[3, H, W\], got float32 \[3, 8, 8\]; convert it"),
        (np.zeros((8, 8, 3), np.uint8), r"got uint8 \[8, 8, 3\]"),
        (np.zeros((3, 0, 8), np.uint8), "needs pixels, got 8 x 0|tile cannot extend"),
        (None, "got NoneType"),
        (tmp_path / "text.jpg", "is corrupt: it is no image"),
        (tmp_path / "gone.jpg", "cannot read .*gone"),
        (cut, "the picture is corrupt: image file is truncated"),
        (Image.new("F", (4, 4)), "floating-point pixels have no known range"),
    ]
    for picture, message in wrong:
        with pytest.raises(ValueError, match=message) as caught:
            transform(picture)
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_as_on_a_cpu(whole: Path) -> None:
    images = some_images(9)
    on_gpu = load_encoder(whole, "cuda")
    assert next(on_gpu.encoder.parameters()).device.type == "cuda"
    torch.testing.assert_close(
        on_gpu.features(images), load_encoder(whole).features(images), rtol=1e-2, atol=1e-3
    )


# ---------------------------------------------------------------------- failures


def test_failed_save_keeps_the_old_file_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    written = exported(path)
    broken = nn.Linear(2, 2)
    broken.register_buffer("nothing", torch.empty(3, device="meta"))  # has no values to write
    with pytest.raises((RuntimeError, NotImplementedError)):
        save_encoder(path, broken, config=CONFIG, feature_dim=2, mean=MEAN, std=STD, classes=[])
    read = load_encoder(path).encoder.state_dict()
    assert all(torch.equal(value, read[key]) for key, value in written.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@settings(max_examples=30, deadline=None)
@given(kept=st.floats(0, 0.9999))
def test_truncated_file_is_refused_in_one_line(whole: Path, kept: float) -> None:
    path, content = whole.with_name("short.safetensors"), whole.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"short\.safetensors cannot be read") as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)


def rewritten(source: Path, target: Path, **changes: str | None) -> Path:
    """The same weights with entries of the metadata changed, or, if None, dropped."""
    with safe_open(source, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    kept = {key: value for key, value in metadata.items() if value is not None}
    save_file(load_file(source), target, metadata=kept)
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrasweep": None}, "is not one of a trainer of format 1"),
        ({"contrasweep": "2"}, "is not one of a trainer of format 1"),
        ({"mean": None}, "is damaged: mean: Field required"),
        ({"mean": "[0.1, 0.2"}, "is damaged: mean: Invalid JSON"),
        ({"mean": "[0.1, 0.2]"}, r"is damaged: mean\.2: Field required"),
        ({"std": "[0.1, 0.2, 0.0]"}, r"is damaged: std\.2: Input should be greater than 0"),
        ({"std": "[0.1, 0.2, NaN]"}, r"is damaged: std"),
        ({"classes": "[1]"}, r"is damaged: classes\.0"),
        ({"config": "{}", "image_size": "64"}, "is damaged: it states .*64"),
        ({"config": '{"lr": -1}'}, "is damaged: lr: Input should be greater than 0, got -1"),
        ({"config": '{"unheard_of": 1}'}, "is damaged: unknown field 'unheard_of'"),
        ({"config": '{"encoder": "gone"}'}, "is damaged: encoder must be one of conv_small"),
        ({"config": "[]"}, "is damaged: config"),
        ({"feature_dim": "191"}, "is damaged: it states .*191"),
        ({"encoder": "resnet18", "config": '{"encoder": "resnet18"}', "feature_dim": "512"}, "fit"),
    ],
)
def test_wrong_metadata_is_refused_in_one_line(
    whole: Path, tmp_path: Path, changes: dict[str, str | None], message: str
) -> None:
    path = rewritten(whole, tmp_path / "wrong.safetensors", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)
    assert "wrong.safetensors" in str(caught.value)


def test_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    bare, torchs = tmp_path / "bare.safetensors", tmp_path / "torch.pt"
    save_file({"weight": torch.ones(3)}, bare)
    torch.save({"weight": torch.ones(3)}, torchs)
    for path, message in (
        (bare, "bare.safetensors is not one of a trainer"),
        (torchs, "torch.pt cannot be read: it is a pickle or an archive"),
        (tmp_path, "encoder.safetensors does not exist or is no file"),
        (tmp_path / "gone.safetensors", "gone.safetensors does not exist"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_encoder(path)
        assert "\n" not in str(caught.value)


class Hostile:
    """What a pickle can do to whoever loads it."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.victim), "w"))


@pytest.mark.parametrize("name", ["encoder.pt", "encoder.pkl", "encoder.safetensors"])
@pytest.mark.parametrize("archive", [False, True])
def test_a_hostile_pickle_is_not_executed(tmp_path: Path, name: str, archive: bool) -> None:
    victim, path = tmp_path / "made-by-the-pickle", tmp_path / name
    if archive:
        torch.save(Hostile(victim), path)
    else:
        path.write_bytes(pickle.dumps(Hostile(victim)))
    with pytest.raises(ValueError, match="may hold code, and was not opened") as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Hostile(victim)))  # it would have worked
    assert victim.exists()


def test_other_suffixes_are_refused_in_one_line(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match=r"onnx must be a \.safetensors file; give an encoder"):
        load_encoder(path)
