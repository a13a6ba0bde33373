"""Pictures of what was learned: a map of features, nearest neighbours, the views trained on.

All are of validation images, which the encoder was not trained on, and drawn from few of them:
they show, and measure nothing. The map is a principal component analysis, and UMAP (McInnes et al.
2018, https://arxiv.org/abs/1802.03426) beside it where the package `umap` is installed. Features
are compared as kNN compares them, at length 1: their lengths alone are a line in healthy networks.
The same encoder, data and seed give the same pictures.

    for name, content in pictures(trained_encoder(checkpoint, data), data, seed=0).items():
        (folder / name).write_bytes(content)

Shapes: N images, F features, Q queries, K neighbours of each, B images of a batch, V views of
each, 3 channels, S pixels a side, T pixels of a thumbnail's side.
"""

from __future__ import annotations

import importlib
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from trainer.augment import TwoViews
from trainer.checkpoint import Checkpoint
from trainer.config import Augmentation, TrainConfig
from trainer.datasets import DataSplits
from trainer.export import ExportedEncoder
from trainer.images import resized
from trainer.models import build_encoder

FORMAT = 1
"""Of the JSON files; raised when a new version can no longer read the old ones."""
MOST_IMAGES, FEWEST_IMAGES = 1_000, 60
"""On the map."""
WORK_FLOP = 1e12
"""Operations for one encoder's features: ten seconds of two cores. A ResNet-18 on 32 pixels
encodes 900 images for it, a ResNet-50 on 224 pixels 120."""
QUERIES, NEIGHBOURS = 8, 6
VIEWED, VIEWS = 6, 8
THUMBNAIL = 64
"""Most pixels of a thumbnail's side."""
BATCH_VALUES = 1 << 21
"""Of one batch of images: 682 of 32 pixels, 13 of 224, whose activations are some ten times it."""
MOST_CHARACTERS = 200
"""Of a class's name."""
UMAP_NEIGHBOURS = 15

SAME_CLASS, OTHER_CLASS = (18, 147, 108), (200, 118, 26)
"""Colours of frames, told apart by the colour-blind; the latter's are dashed, too."""
_FRAME, _CELL_GAP, _FIRST_GAP, _DASH = 3, 1, 8, 8  # pixels

_MULTIPLYING = (nn.Conv2d, nn.Linear)

Check = Callable[[], None]


def trained_encoder(
    checkpoint: Checkpoint, data: DataSplits, device: torch.device | str = "cpu"
) -> ExportedEncoder:
    """The encoder that a run measured and would keep, out of its checkpoint.

    A ValueError says that the state is not one of its configuration.
    """
    config, state = checkpoint.config, checkpoint.state
    with torch.random.fork_rng(devices=[]):
        encoder, feature_dim = build_encoder(config.encoder, config.image_size)
    try:
        averaged = config.ema_decay is not None and config.task != "linear"
        weights = state["average"]["module"] if averaged else state["network"]
        if not averaged or config.task == "finetune":  # then the head's are averaged, too
            prefix = "encoder."
            weights = {
                k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)
            }
        encoder.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        why = str(error).strip().split("\n")[0]
        raise ValueError(f"the checkpoint is not one of its configuration: {why}") from error
    return ExportedEncoder(
        encoder.to(device).eval(), config, feature_dim, data.mean, data.std, data.classes
    )


def pictures(
    encoder: ExportedEncoder,
    data: DataSplits,
    *,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    check: Check = lambda: None,
) -> dict[str, bytes]:
    """Name of a file -> its content: map.json, neighbours.json and .png, views.png, about.json.

    `about` is further entries of about.json. `check` is called between batches and may raise, to
    end it early. Without labels nothing is coloured or marked. ValueError where a feature is not
    finite.
    """
    count = min(len(data.val), images_within(encoder, WORK_FLOP))
    labels_N = data.val.labels[:count]
    labelled = bool(count and (labels_N >= 0).all())
    features_NF = encode(encoder, data, count, check)
    unit_NF = unit_rows(features_NF)
    rows_Q = spread_rows(labels_N, QUERIES, seed)
    nearest_QK, cosine_QK = nearest(unit_NF, rows_Q, NEIGHBOURS)
    check()
    maps, left_out = feature_maps(unit_NF, seed)
    check()

    shown_QJ = np.concatenate([rows_Q[:, None], nearest_QK], axis=1)
    same_QJ = labels_N[shown_QJ] == labels_N[rows_Q][:, None]
    tiles = [thumbnail(image) for image in data.val.pixels(shown_QJ.reshape(-1))]
    frames = [same if labelled else None for same in same_QJ.reshape(-1).tolist()]
    frames[:: shown_QJ.shape[1]] = [None] * len(rows_Q)
    viewed = data.val.pixels(spread_rows(labels_N, VIEWED, seed))
    views = augmented_views(encoder.config, viewed, encoder.mean, encoder.std, seed=seed)
    seen = np.concatenate([viewed[:, None], views], axis=1)
    check()

    labels = {
        "classes": [name[:MOST_CHARACTERS] for name in data.classes] if labelled else [],
        "labels": labels_N.tolist() if labelled else None,
    }
    neighbours = {
        "rows": rows_Q.tolist(),
        "neighbours": nearest_QK.tolist(),
        "cosine": np.round(cosine_QK, 4).tolist(),
        "labels": labels_N[shown_QJ].tolist() if labelled else None,
        "classes": labels["classes"],
    }
    described = {
        "format": FORMAT,
        "seed": seed,
        "encoder": encoder.config.encoder,
        "features": encoder.feature_dim,
        "images": count,
        "val_images": len(data.val),
        "image_size": encoder.config.image_size,
        "views": _views_in_words(encoder.config),
        "left_out": left_out,
        **(about or {}),
    }
    return {
        "map.json": _json({"maps": maps, **labels}),
        "neighbours.json": _json(neighbours),
        "neighbours.png": sheet(tiles, shown_QJ.shape[1], frames),
        "views.png": sheet(
            [thumbnail(image) for row in seen for image in row],
            seen.shape[1],
            [None] * (seen.shape[0] * seen.shape[1]),
        ),
        "about.json": _json(described),
    }


# ---------------------------------------------------------------------- features


def images_within(encoder: ExportedEncoder, flop: float) -> int:
    """How many images the encoder encodes for so many operations: 60 to 1,000.

    Counted are the products and sums of convolutions and linear layers, so a third of a vision
    transformer's are not. Torch's own counter takes two seconds to be ready.
    """
    counted = [0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight  # [out, in / groups, ...]
        assert isinstance(weight, Tensor)
        counted[0] += 2 * output.numel() * weight[0].numel()

    layers = [each for each in encoder.encoder.modules() if isinstance(each, _MULTIPLYING)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    size = encoder.config.image_size
    try:
        encoder.features(np.zeros((1, 3, size, size), np.uint8))
    finally:
        for hook in hooks:
            hook.remove()
    return int(np.clip(flop // max(1, counted[0]), FEWEST_IMAGES, MOST_IMAGES))


def encode(
    encoder: ExportedEncoder, data: DataSplits, count: int, check: Check = lambda: None
) -> NDArray[np.float32]:
    """Features [N, F] of the first `count` validation images, which are in random order.

    A batch of images is held at a time. ValueError where a feature is not finite.
    """
    size = encoder.config.image_size
    step = max(1, BATCH_VALUES // (3 * size * size))
    parts = [np.empty((0, encoder.feature_dim), np.float32)]
    for start in range(0, count, step):
        check()
        images = data.val.pixels(np.arange(start, min(count, start + step)))
        parts.append(encoder.features(images).numpy())
    features_NF = np.concatenate(parts)
    broken = int((~np.isfinite(features_NF).all(axis=1)).sum())
    if broken:
        raise ValueError(f"features are not finite for {broken} of {count} images")
    return features_NF


def unit_rows(features_NF: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows scaled to length 1; a row of zeros stays."""
    precise = features_NF.astype(np.float64)
    length_N1 = np.linalg.norm(precise, axis=1, keepdims=True)
    return precise / np.where(length_N1 > 0, length_N1, 1)


def principal_axes(
    unit_NF: NDArray[np.float64],
) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Coordinates [N, 2] on the two axes of most variance, and the share of it on each.

    The largest weight of an axis in absolute terms is positive, which settles its direction.
    """
    centred_NF = unit_NF - unit_NF.mean(axis=0) if len(unit_NF) else unit_NF
    _, singular, axes = np.linalg.svd(centred_NF, full_matrices=False)
    total = float((singular**2).sum())
    xy_N2, shares = np.zeros((len(unit_NF), 2)), [0.0, 0.0]
    # What rounding alone has left of equal features is no axis.
    for place in range(min(2, len(singular)) if total > 1e-12 else 0):
        axis = axes[place]
        sign = 1.0 if axis[np.abs(axis).argmax()] >= 0 else -1.0
        xy_N2[:, place] = centred_NF @ (axis * sign)
        shares[place] = float(singular[place] ** 2 / total)
    return xy_N2, (shares[0], shares[1])


def feature_maps(unit_NF: NDArray[np.float64], seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The maps that can be drawn, PCA first, and in a line each those that failed."""
    xy_N2, explained = principal_axes(unit_NF)
    maps = [_axes("pca", xy_N2, explained)]
    if len(unit_NF) <= UMAP_NEIGHBOURS + 1:
        return maps, []
    try:
        umap = importlib.import_module("umap")
    except ImportError:
        return maps, []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a seed leaves it one core
            found = umap.UMAP(n_neighbors=UMAP_NEIGHBOURS, random_state=seed).fit_transform(unit_NF)
        maps.append(_axes("umap", np.asarray(found, np.float64), None))
    except Exception as error:  # whatever an optional package raises; the other map stands
        return maps, [f"no UMAP: {type(error).__name__}: {error}"[:300]]
    return maps, []


def _axes(
    method: str, xy_N2: NDArray[np.float64], explained: tuple[float, float] | None
) -> dict[str, Any]:
    return {
        "method": method,
        "x": np.round(xy_N2[:, 0], 4).tolist(),
        "y": np.round(xy_N2[:, 1], 4).tolist(),
        "explained": None if explained is None else [round(each, 4) for each in explained],
    }


def spread_rows(labels_N: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Draw `count` rows, or all of fewer, of as many classes as there are, by class."""
    keys_N = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 7]))).random(
        len(labels_N)
    )
    order_N = np.lexsort((keys_N, labels_N))  # class by class, at random within each
    _, starts, counts = np.unique(labels_N[order_N], return_index=True, return_counts=True)
    rank_N = np.arange(len(labels_N)) - np.repeat(starts, counts)
    chosen = order_N[np.lexsort((keys_N[order_N], rank_N))[:count]]
    return chosen[np.argsort(labels_N[chosen], kind="stable")]


def nearest(
    unit_NF: NDArray[np.float64], rows_Q: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of some rows the k others of highest cosine, falling: their numbers [Q, K] and cosines."""
    cosine_QN = unit_NF[rows_Q] @ unit_NF.T
    cosine_QN[np.arange(len(rows_Q)), rows_Q] = -np.inf
    order_QK = np.argsort(-cosine_QN, axis=1, kind="stable")[:, : max(0, min(k, len(unit_NF) - 1))]
    return order_QK, np.take_along_axis(cosine_QN, order_QK, axis=1)


# ---------------------------------------------------------------------- images


def augmented_views(
    config: TrainConfig,
    images_B3SS: NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    seed: int = 0,
    count: int = VIEWS,
) -> NDArray[np.uint8]:
    """`count` (an even number) views of each image as training draws them: uint8 [B, V, 3, S, S].

    Two from each batch: the order of the colour operations is drawn once a batch.
    """
    two_views = TwoViews(config, mean, std, "cpu")
    generator = torch.Generator()
    generator.manual_seed(seed)
    images = torch.from_numpy(np.array(images_B3SS))
    drawn = torch.cat([two_views(images, generator) for _ in range(count // 2)])
    views_VB3SS = drawn.reshape(-1, *images.shape)
    shape = (1, 1, 3, 1, 1)
    shown = views_VB3SS * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)
    pixels = (shown * 255).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.transpose(0, 1).contiguous().numpy()


def thumbnail(image_3SS: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image of at most 64 pixels a side [T, T, 3]: shrunk, or its pixels repeated."""
    side = image_3SS.shape[1]
    small = resized(image_3SS, THUMBNAIL) if side > THUMBNAIL else image_3SS
    factor = max(1, THUMBNAIL // side)
    return small.transpose(1, 2, 0).repeat(factor, axis=0).repeat(factor, axis=1)


def sheet(tiles: Sequence[NDArray[np.uint8]], columns: int, frames: Sequence[bool | None]) -> bytes:
    """Thumbnails [T, T, 3] row by row as one PNG with a transparent ground.

    The first column stands apart. A frame is solid for True, dashed for False, none for None.
    """
    side = tiles[0].shape[0] if tiles else THUMBNAIL
    cell = side + 2 * (_FRAME + _CELL_GAP)
    rows = -(-len(tiles) // max(1, columns))
    gap = _FIRST_GAP if columns > 1 else 0
    canvas = np.zeros((max(1, rows * cell), max(1, columns * cell + gap), 4), np.uint8)
    framed = _frames(side)
    for place, (tile, same) in enumerate(zip(tiles, frames, strict=True)):
        row, column = divmod(place, columns)
        top = row * cell + _CELL_GAP
        left = column * cell + _CELL_GAP + (gap if column else 0)
        whole = side + 2 * _FRAME
        part = canvas[top : top + whole, left : left + whole]
        if same is not None:
            part[framed[same]] = (*(SAME_CLASS if same else OTHER_CLASS), 255)
        inner = part[_FRAME:-_FRAME, _FRAME:-_FRAME]
        inner[..., :3], inner[..., 3] = tile, 255
    encoded = io.BytesIO()
    Image.fromarray(canvas).save(encoded, "PNG")
    return encoded.getvalue()


def _frames(side: int) -> dict[bool, NDArray[np.bool_]]:
    """Which pixels of a framed tile are the frame: solid for True, dashed for False."""
    whole = side + 2 * _FRAME
    ring = np.ones((whole, whole), bool)
    ring[_FRAME:-_FRAME, _FRAME:-_FRAME] = False
    down, across = np.indices(ring.shape)
    dashes = (down + across) // _DASH % 2 == 0
    return {True: ring, False: ring & dashes}


def _views_in_words(config: TrainConfig) -> dict[str, Any]:
    """What is done to a view: chances of what happens at all, and the two main magnitudes."""
    chances = {name: config.chance(name) for name in get_args(Augmentation)}
    return {
        "chances": {name: chance for name, chance in chances.items() if chance > 0},
        "strength": config.strength,
        "crop_min_scale": config.crop_min_scale,
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
