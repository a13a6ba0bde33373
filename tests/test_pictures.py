"""Pictures of what an encoder learned: held against scikit-learn, the trainer itself and Pillow."""

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from torch.utils.flop_counter import FlopCounterMode

from trainer import pictures as made
from trainer.augment import TwoViews
from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig
from trainer.datasets import DataSplits, Split
from trainer.export import ExportedEncoder
from trainer.loop import Trainer
from trainer.models import build_encoder
from trainer.pictures import (
    OTHER_CLASS,
    SAME_CLASS,
    augmented_views,
    encode,
    feature_maps,
    images_within,
    nearest,
    pictures,
    principal_axes,
    sheet,
    spread_rows,
    thumbnail,
    trained_encoder,
    unit_rows,
)

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)


def splits(size: int = 28, count: int = 24, classes: int = 4, grey: bool = False) -> DataSplits:
    """Random images, of classes in turn; unlabelled for no classes."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    if grey:
        images[:, 1:] = images[:, :1]
    labels = np.arange(count) % classes if classes else np.full(count, -1)
    split = Split(images, labels.astype(np.int64))
    names = tuple(f"class {number}" for number in range(classes))
    return DataSplits("made", names, split, split, split, split, (), MEAN, STD)


def untrained(data: DataSplits, **fields: Any) -> ExportedEncoder:
    config = TrainConfig(image_size=data.val.images.shape[2], **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, width = build_encoder(config.encoder, config.image_size)
    return ExportedEncoder(encoder.eval(), config, width, data.mean, data.std, data.classes)


@pytest.fixture(scope="module")
def clusters() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Three clusters of directions in 32 dimensions, and whose each row is."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 32))
    labels = np.repeat(np.arange(3), 40)
    lengths = rng.uniform(0.1, 50, (120, 1))
    features = lengths * (centres[labels] + 0.15 * rng.normal(size=(120, 32)))
    return features.astype(np.float32), labels


# ---- features


def test_the_map_separates_what_is_apart(
    clusters: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    features, labels = clusters
    xy, explained = principal_axes(unit_rows(features))
    assert silhouette_score(xy, labels) > 0.8
    assert silhouette_score(xy, np.random.default_rng(1).permutation(labels)) < 0.1
    assert sum(explained) > 0.8


def test_the_axes_are_the_principal_ones_whatever_the_order_of_the_images(
    clusters: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    unit = unit_rows(clusters[0])
    oracle = PCA(2, svd_solver="full").fit(unit)
    xy, explained = principal_axes(unit)
    assert explained == pytest.approx(oracle.explained_variance_ratio_)
    np.testing.assert_allclose(np.abs(xy), np.abs(oracle.transform(unit)), atol=1e-10)
    np.testing.assert_allclose(principal_axes(unit[::-1])[0], xy[::-1], atol=1e-10)
    for place in range(2):  # the heaviest weight of each axis is positive
        weights = xy[:, place] @ (unit - unit.mean(axis=0))
        assert weights[np.abs(weights).argmax()] > 0


@pytest.mark.parametrize("features", [np.ones((9, 5)), np.zeros((9, 5)), np.ones((1, 5))])
def test_features_that_are_all_alike_have_no_axes(features: NDArray[np.float32]) -> None:
    xy, explained = principal_axes(unit_rows(features))
    assert not xy.any()
    assert explained == (0.0, 0.0)


def test_one_dimension_has_one_axis() -> None:
    xy, explained = principal_axes(np.array([[1.0], [-1.0], [1.0]]))
    assert explained == (1.0, 0.0)
    assert not xy[:, 1].any()


def test_neighbours_are_those_of_scikit_learn(
    clusters: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    features, _ = clusters
    rows = np.array([0, 5, 60, 119])
    found, cosine = nearest(unit_rows(features), rows, 6)
    oracle = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(features)
    distances, neighbours = oracle.kneighbors(features[rows])
    assert neighbours[:, 0].tolist() == rows.tolist()
    np.testing.assert_array_equal(found, neighbours[:, 1:])
    np.testing.assert_allclose(cosine, 1 - distances[:, 1:], atol=1e-5)


def test_of_few_images_all_others_are_neighbours() -> None:
    found, _ = nearest(unit_rows(np.eye(3, dtype=np.float32)), np.arange(3), 6)
    assert [sorted(row) for row in found.tolist()] == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.parametrize(("classes", "counts"), [(20, [1] * 8), (3, [2, 3, 3]), (1, [8])])
def test_rows_are_spread_over_the_classes(classes: int, counts: list[int]) -> None:
    labels = np.random.default_rng(0).permutation(np.arange(200) % classes)
    rows = spread_rows(labels, 8, seed=0)
    assert len(set(rows.tolist())) == 8
    assert sorted(np.unique(labels[rows], return_counts=True)[1].tolist()) == counts
    assert spread_rows(labels, 8, seed=0).tolist() == rows.tolist()
    assert spread_rows(labels, 8, seed=1).tolist() != rows.tolist()
    assert set(spread_rows(labels, 6, seed=0).tolist()) <= set(rows.tolist())


def test_the_work_is_bounded_by_the_number_of_images() -> None:
    encoder = untrained(splits(32))
    small = images_within(encoder, 1)
    assert (small, images_within(encoder, 1e15)) == (made.FEWEST_IMAGES, made.MOST_IMAGES)
    some = images_within(encoder, 4e9)
    assert small < some < made.MOST_IMAGES
    assert images_within(encoder, 8e9) == pytest.approx(2 * some, abs=1)
    assert images_within(untrained(splits(64)), 16e9) == pytest.approx(some, rel=0.05)


@pytest.mark.slow
def test_operations_are_those_that_torch_counts() -> None:
    encoder = untrained(splits(32), encoder="resnet18")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.encoder(torch.zeros(1, 3, 32, 32))
    flop = counter.get_total_flops()
    assert images_within(encoder, 100 * flop) == 100


def test_images_are_read_a_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []
    data = splits(28)
    whole = encode(untrained(data), data, 24)

    class Counting(Split):
        def pixels(self, rows: Any) -> NDArray[np.uint8]:
            most.append(len(rows))
            return super().pixels(rows)

    counting = replace(data, val=Counting(data.val.images, data.val.labels))
    monkeypatch.setattr(made, "BATCH_VALUES", 5 * 3 * 28 * 28)
    checks: list[int] = []
    parts = encode(untrained(data), counting, 23, lambda: checks.append(1))
    assert most == [5, 5, 5, 5, 3]
    assert len(checks) == 5
    np.testing.assert_allclose(parts, whole[:23], atol=1e-5)


def test_features_that_are_not_finite_are_named() -> None:
    data = splits()
    encoder = untrained(data)
    next(encoder.encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite for 24 of 24 images"):
        pictures(encoder, data)


def test_umap_is_beside_pca_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = unit_rows(np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32))
    monkeypatch.setitem(sys.modules, "umap", None)
    maps, left_out = feature_maps(unit, seed=4)
    assert [each["method"] for each in maps] == ["pca"]
    assert left_out == []

    given = {}

    class Umap:
        def __init__(self, **options: Any) -> None:
            given.update(options)

        def fit_transform(self, features: NDArray[np.float64]) -> NDArray[np.float32]:
            return features[:, :2].astype(np.float32)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    maps, _ = feature_maps(unit, seed=4)
    assert [each["method"] for each in maps] == ["pca", "umap"]
    assert given["random_state"] == 4
    assert maps[1]["explained"] is None
    assert maps[1]["x"] == pytest.approx(unit[:, 0], abs=1e-4)
    assert [each["method"] for each in feature_maps(unit[:16], seed=4)[0]] == ["pca"]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=lambda **options: 1 / 0))
    maps, left_out = feature_maps(unit, seed=4)
    assert [each["method"] for each in maps] == ["pca"]
    assert left_out == ["no UMAP: ZeroDivisionError: division by zero"]


# ---- images


def test_views_are_those_that_training_draws() -> None:
    config = TrainConfig(blur_p=0.5, rotation_p=0.5, cutout_p=0.3, solarize_p=0.2)
    images = splits(32).val.images[:3]
    views = augmented_views(config, images, MEAN, STD, seed=11)
    assert views.shape == (3, 8, 3, 32, 32)
    generator = torch.Generator()
    generator.manual_seed(11)
    own = TwoViews(config, MEAN, STD, "cpu")
    for pair in range(4):
        drawn = own(torch.from_numpy(images), generator).double().numpy()
        for half in range(2):
            for row in range(3):
                for channel in range(3):
                    shown = drawn[half * 3 + row, channel] * STD[channel] + MEAN[channel]
                    found = views[row, 2 * pair + half, channel]
                    assert np.abs(found - np.clip(255 * shown, 0, 255)).max() < 0.501
    again = augmented_views(config, images, MEAN, STD, seed=11)
    np.testing.assert_array_equal(again, views)
    assert (augmented_views(config, images, MEAN, STD, seed=12) != views).mean() > 0.5


def test_without_augmentation_the_views_are_the_images() -> None:
    images = splits(28).val.images[:2]
    views = augmented_views(TrainConfig(augment="none"), images, MEAN, STD)
    np.testing.assert_array_equal(views, np.repeat(images[:, None], 8, axis=1))


@pytest.mark.parametrize(
    ("size", "side"), [(8, 64), (28, 56), (32, 64), (48, 48), (64, 64), (65, 64), (224, 64)]
)
def test_thumbnails_are_at_most_64_pixels(size: int, side: int) -> None:
    image = splits(size, 1).val.images[0]
    small = thumbnail(image)
    assert small.shape == (side, side, 3)
    if size <= 64:
        factor = side // size
        np.testing.assert_array_equal(small[::factor, ::factor].transpose(2, 0, 1), image)
        np.testing.assert_array_equal(small[factor - 1 :: factor], small[::factor])
    else:
        assert small.mean() == pytest.approx(image.mean(), abs=3)


def test_a_sheet_holds_its_thumbnails_and_frames() -> None:
    tiles = [thumbnail(image) for image in splits(32, 6).val.images]
    png = sheet(tiles, 3, [None, True, False, None, False, None])
    canvas = np.asarray(Image.open(io.BytesIO(png)))
    cell = 72
    assert canvas.shape == (2 * cell, 3 * cell + 8, 4)
    for place, tile in enumerate(tiles):
        row, column = divmod(place, 3)
        left = column * cell + (8 if column else 0)
        whole = canvas[row * cell : (row + 1) * cell, left : left + cell]
        np.testing.assert_array_equal(whole[4:68, 4:68, :3], tile)
        assert (whole[4:68, 4:68, 3] == 255).all()
        ring = np.ones((cell, cell), bool)
        ring[4:68, 4:68] = False
        ring[[0, -1]] = ring[:, [0, -1]] = False
        assert not whole[[0, -1], :, 3].any()
        colours = {tuple(colour) for colour in whole[ring].tolist()}
        share = (whole[ring][:, 3] == 255).mean()
        if place == 1:
            assert colours == {(*SAME_CLASS, 255)}
        elif place in (2, 4):
            assert colours == {(*OTHER_CLASS, 255), (0, 0, 0, 0)}
            assert 0.35 < share < 0.65
        else:
            assert share == 0


# ---- all of it


def content(files: dict[str, bytes], name: str) -> Any:
    return json.loads(files[name])


def test_pictures_are_the_same_each_time_and_say_what_they_show() -> None:
    data = splits(28)
    encoder = untrained(data, encoder="conv_small", strength=0.7)
    files = pictures(encoder, data, seed=0, about={"trial": 5})
    assert files == pictures(encoder, data, seed=0, about={"trial": 5})
    about, maps, near = (content(files, f"{name}.json") for name in ("about", "map", "neighbours"))
    assert (about["images"], about["val_images"], about["trial"]) == (24, 24, 5)
    assert about["views"]["chances"] == {"crop": 1.0, "flip": 0.5, "jitter": 0.8, "grayscale": 0.2}
    assert about["views"]["strength"] == 0.7
    assert maps["labels"] == data.val.labels.tolist()
    assert maps["classes"] == list(data.classes)
    features = encoder.features(data.val.images).numpy()
    xy, _ = principal_axes(unit_rows(features))
    assert maps["maps"][0]["x"] == pytest.approx(xy[:, 0].tolist(), abs=1e-4)

    columns = 7
    canvas = np.asarray(Image.open(io.BytesIO(files["neighbours.png"])))
    cell = 56 + 8
    assert canvas.shape == (8 * cell, columns * cell + 8, 4)
    shown = np.concatenate([np.array(near["rows"])[:, None], near["neighbours"]], axis=1)
    np.testing.assert_array_equal(near["labels"], data.val.labels[shown])
    for row in range(8):
        for column in range(columns):
            left = column * cell + (8 if column else 0)
            inner = canvas[row * cell + 4 : row * cell + 60, left + 4 : left + 60, :3]
            np.testing.assert_array_equal(inner, thumbnail(data.val.images[shown[row, column]]))
            same = near["labels"][row][column] == near["labels"][row][0]
            side = canvas[row * cell + 4 : row * cell + 60, left + 2, 3]  # of the frame
            assert (side == 255).mean() == (0 if column == 0 else 1 if same else pytest.approx(0.5))
    views = Image.open(io.BytesIO(files["views.png"]))
    assert views.size == (9 * cell + 8, 6 * cell)


def test_without_labels_nothing_is_coloured_or_marked() -> None:
    data = splits(32, 12, classes=0)
    files = pictures(untrained(data), data)
    assert content(files, "map.json")["labels"] is None
    assert content(files, "neighbours.json")["labels"] is None
    canvas = np.asarray(Image.open(io.BytesIO(files["neighbours.png"])))
    assert int((canvas[..., 3] == 255).sum()) == 8 * 7 * 64 * 64  # thumbnails alone


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_images_are_enough(count: int) -> None:
    data = splits(28, count)
    files = pictures(untrained(data), data)
    near = content(files, "neighbours.json")
    assert [len(row) for row in near["neighbours"]] == [min(6, count - 1)] * count
    for name in ("neighbours.png", "views.png"):
        Image.open(io.BytesIO(files[name])).load()


@pytest.mark.parametrize("grey", [False, True])
def test_large_images_and_grey_ones(grey: bool) -> None:
    data = splits(224, 9, grey=grey)
    files = pictures(untrained(data, augment="crop,flip"), data)
    for name in ("neighbours.png", "views.png"):
        rgb = np.asarray(Image.open(io.BytesIO(files[name])))
        inside = rgb[4:68, 4:68, :3]  # the first thumbnail, which has no frame
        assert inside.std() > 1
        assert (inside[..., 0] == inside[..., 1]).all() == grey
        assert len(files[name]) < 1_000_000


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_encoder_is_the_one_that_training_measured(ema_decay: float | None) -> None:
    data = splits(16, 40)
    config = TrainConfig(image_size=16, batch_size=20, epochs=2, ema_decay=ema_decay, threads=1)
    trainer = Trainer(config, data)
    for _ in range(2):
        trainer._step()
    state = trainer.state_dict()
    before = torch.random.get_rng_state()
    encoder = trained_encoder(Checkpoint(config, 40, state), data)
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_allclose(
        encoder.features(data.val.images), trainer.features(data.val.images), atol=2e-2
    )
    assert not np.allclose(
        encoder.features(data.val.images), untrained(data).features(data.val.images), atol=2e-2
    )
    del state["network" if ema_decay is None else "average"]
    with pytest.raises(ValueError, match="not one of its configuration"):
        trained_encoder(Checkpoint(config, 40, state), data)


def test_whoever_waits_may_end_it() -> None:
    data, left = splits(), [3]

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        pictures(untrained(data), data, check=check)
