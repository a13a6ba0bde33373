"""An encoder and a folder of images -> one Parquet file of features, a row for each image.

Columns: `file`, the path below the folder with forward slashes; `class`, the first folder of that
path, null for a file in the folder itself; `features`, a list of F float32. One column, not F of
them: it is a matrix without a copy to numpy, a vector to DuckDB, and files with thousands of
columns are slow everywhere. Beside them, as JSON under the key `contrasweep` of the schema's
metadata: the encoder (digest, size, normalisation, configuration) and what was skipped.

The work is done in parts, each written whole or not at all to a folder beside the output, so that
a run that was killed goes on where it was. Neither images nor features are ever held all at once:
memory is that of a part and of the list of names, whatever the size of the folder.

Shapes: N files of images, B images of a batch, 3 channels, S pixels a side, F features.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.cache import Progress
from trainer.device import is_out_of_memory, pick_device
from trainer.export import BATCH, ExportedEncoder, encoder_file, fingerprint, load_encoder
from trainer.feature_parts import NAMED, FeatureParts, Plan, Skipped
from trainer.folder import EXTENSIONS
from trainer.images import CorruptImageError, ImageFiles, read_image
from trainer.stream import reader

BATCH_SIZE = 256
PART_IMAGES = 2048
"""Images whose features are lost, at most, when a run is killed."""
_CORRUPT, _UNREADABLE = 1, 2


@dataclass(frozen=True)
class Embedded:
    """What came of `embed_folder`; `continued` images were there from a run before."""

    out: Path
    rows: int
    feature_dim: int
    images: int
    continued: int
    corrupt: Skipped
    not_images: Skipped
    encoder_digest: str
    wall_s: float
    images_per_s: float
    """While images were encoded: without what comes before and after."""


def embed_folder(
    model: Path | str,
    folder: Path,
    out: Path,
    *,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
    workers: int | None = None,
    force: bool = False,
    part_images: int = PART_IMAGES,
    progress: Progress | None = None,
) -> Embedded:
    """Write the features of all images below `folder` to `out`, a `.parquet` file.

    `model` is an `encoder.safetensors` or a folder that holds one; `workers` processes decode
    (None: as many as there are cores, at most 16). Images are resized as in training. A run that
    was interrupted is gone on with by the same call; `force` replaces an older `out`, and parts
    that another encoder or other images left behind.

    ValueError in one line: an encoder, folder or file name that will not do, an `out` that
    exists, parts of another encoder or of other images, no image that can be decoded.
    """
    if out.suffix.lower() != ".parquet":
        raise ValueError(f"features are written to a .parquet file, got {str(out)!r}; rename it")
    if not 1 <= batch_size <= BATCH:
        raise ValueError(f"batch size must be in [1, {BATCH}], got {batch_size}")
    out = Path(os.path.realpath(out.expanduser().parent)) / out.name
    _check_free(out, force)
    chosen = pick_device(device)
    started = time.monotonic()
    path = encoder_file(model)
    encoder = load_encoder(path, chosen)
    parts = FeatureParts(out)
    found = _find(folder, {str(out), str(parts.folder)})
    plan = Plan(len(found.names), found.digest, fingerprint(encoder), part_images)
    with parts.held():
        _check_free(out, force)  # another process may have finished it by now
        parts.begin(plan, found.folder, path, force)
        work = _Work(encoder, found, parts, batch_size, workers, progress or (lambda *_: None))
        began = time.monotonic()
        continued = work.compute()
        encoding_s = time.monotonic() - began
        rows, corrupt = parts.summary()
        if not rows:
            parts.clear()
            first = corrupt.first[0]
            raise ValueError(
                f"none of {corrupt.count} images below {found.folder!r} can be read; the first is "
                f"{first['file']!r}: {first['why']}"
            )
        about = {
            "encoder": _about_encoder(encoder, plan.encoder_digest),
            "folder": _text(os.fsencode(found.folder)),
            "images": plan.images,
            "rows": rows,
            "skipped": {"corrupt": corrupt.to_json(), "not_images": found.not_images.to_json()},
        }
        parts.join(about, encoder.feature_dim)
        parts.clear()
    return Embedded(
        out=out,
        rows=rows,
        feature_dim=encoder.feature_dim,
        images=plan.images,
        continued=continued,
        corrupt=corrupt,
        not_images=found.not_images,
        encoder_digest=plan.encoder_digest,
        wall_s=time.monotonic() - started,
        images_per_s=(plan.images - continued) / max(encoding_s, 1e-9),
    )


def _check_free(out: Path, force: bool) -> None:
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a .parquet file")
    if out.exists() and not force:
        raise ValueError(f"{out} exists; add --force to replace it, or name another file")


def _about_encoder(encoder: ExportedEncoder, digest: str) -> dict[str, Any]:
    return {
        "digest": digest,
        "name": encoder.config.encoder,
        "image_size": encoder.config.image_size,
        "feature_dim": encoder.feature_dim,
        "mean": encoder.mean,
        "std": encoder.std,
        "config": encoder.config.model_dump(mode="json"),
    }


# ---- the files


@dataclass(frozen=True)
class _Found:
    """Images below a folder, in order; the digest is of their names, sizes and times."""

    folder: str
    names: NDArray[np.bytes_]
    digest: str
    not_images: Skipped


def _find(folder: Path, own: set[str]) -> _Found:
    """List the images anywhere below a folder; hidden files and `own` ones do not count."""
    root = os.path.realpath(folder.expanduser())
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "does not exist"
        raise ValueError(f"folder {root!r} {what}; give a folder of images")
    names: list[bytes] = []
    others = Skipped()
    digest = hashlib.sha256()
    try:
        for name, entry in _walk(root, "", own):
            why = ""
            if os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
                why = "no image by its name"
            elif not entry.is_file():
                why = "no file"
            if entry.is_symlink() and entry.is_dir():
                why = "a link to a folder, not followed"
            if why:
                others.add(_text(os.fsencode(name)), why)
                continue
            about = entry.stat()
            names.append(os.fsencode(name))
            digest.update(b"%b\0%d\0%d\n" % (names[-1], about.st_size, about.st_mtime_ns))
    except OSError as error:
        raise ValueError(f"cannot read {error.filename!r}: {error.strerror}; fix it") from None
    if not names:
        there = f"no image among its {others.count} files" if others.count else "no file"
        raise ValueError(f"folder {root!r} holds {there}; expected {', '.join(sorted(EXTENSIONS))}")
    return _Found(root, np.array(names, np.bytes_), digest.hexdigest()[:32], others)


def _walk(folder: str, prefix: str, own: set[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all files below a folder by name, in the order of names folder by folder."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith(".") or entry.path in own:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", own)
        else:
            yield prefix + entry.name, entry


def _text(name: bytes) -> str:
    """A name as Parquet can hold it: bytes that are not UTF-8 are written as \\xNN."""
    return name.decode("utf-8", "backslashreplace")


@dataclass(frozen=True, eq=False)
class _MarkedFiles(ImageFiles):
    """Image files of which the bad ones are left black and marked, instead of replaced.

    Attributes: `marks_N`, uint8 in memory that decoding processes share.
    """

    marks_N: NDArray[np.uint8]

    def read(self, rows_B: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[int]]:
        """Decode rows -> (uint8 [B, 3, S, S], none that others stand in for).

        A file that is gone or not permitted is marked, too. Any other failure to read may pass,
        as of a network, and is a ValueError: its image would be lost for nothing.
        """
        images = np.zeros((len(rows_B), *self.shape[1:]), np.uint8)
        for place, row in enumerate(rows_B.tolist()):
            path = os.path.join(self.folder, self.name(row))
            try:
                images[place] = read_image(path, self.image_size)
            except CorruptImageError:
                self.marks_N[row] = _CORRUPT
            except ValueError:
                if os.access(path, os.R_OK):
                    raise
                self.marks_N[row] = _UNREADABLE
        return images, []

    def why(self, row: int) -> str:
        """Why a marked file has no features; it is read once more for this."""
        if self.marks_N[row] == _UNREADABLE:
            return "gone, or not permitted to read"
        path = os.path.join(self.folder, self.name(row))
        try:
            read_image(path, self.image_size)
        except ValueError as error:
            return str(error).removeprefix(f"{path!r} is corrupt: ")
        return "could not be decoded when it was read"


# ---- the computation


@dataclass(frozen=True)
class _Work:
    encoder: ExportedEncoder
    found: _Found
    parts: FeatureParts
    batch_size: int
    workers: int | None
    progress: Progress

    def compute(self) -> int:
        """Write all parts that are missing -> number of images of those that are there."""
        plan = self.parts.plan
        missing = [part for part in range(len(plan)) if not self.parts.is_done(part)]
        done = continued = plan.images - sum(len(plan.rows(part)) for part in missing)
        self.progress(done, plan.images)
        files = self._files()
        device = next(self.encoder.parameters()).device
        batches = reader(files, device, self.workers).batches(
            torch.arange(rows.start, rows.stop)
            for part in missing
            for rows in self._batch_rows(part)
        )
        for part in missing:
            features = []
            for rows in self._batch_rows(part):
                images_B3SS = next(batches)
                good_B = files.marks_N[rows.start : rows.stop] == 0
                features.append(self._encode(images_B3SS)[good_B])
                self._check_finite(features[-1], rows, good_B)
                done += len(rows)
                self.progress(done, plan.images)
            self._write(part, np.concatenate(features), files)
        return continued

    def _encode(self, images_B3SS: Tensor) -> NDArray[np.float32]:
        try:
            features_BF: NDArray[np.float32] = self.encoder.features(images_B3SS).numpy()
        except Exception as error:
            if is_out_of_memory(error):
                raise ValueError(
                    f"memory ran out with a batch of {len(images_B3SS)} images; give a smaller "
                    "--batch-size"
                ) from None
            raise
        return features_BF

    def _files(self) -> _MarkedFiles:
        count = len(self.found.names)
        marks_N = np.frombuffer(mmap.mmap(-1, count), np.uint8)
        labels = np.full(count, -1, np.int64)
        size = self.encoder.config.image_size
        return _MarkedFiles(self.found.folder, self.found.names, labels, size, marks_N)

    def _batch_rows(self, part: int) -> Iterator[range]:
        """Rows of each batch of a part: the same, whichever part a run begins with."""
        rows = self.parts.plan.rows(part)
        for start in range(rows.start, rows.stop, self.batch_size):
            yield range(start, min(start + self.batch_size, rows.stop))

    def _check_finite(
        self, features_BF: NDArray[np.float32], rows: range, good_B: NDArray[np.bool_]
    ) -> None:
        finite_B = np.isfinite(features_BF).all(axis=1)
        if not finite_B.all():
            row = np.arange(rows.start, rows.stop)[good_B][~finite_B][0]
            raise ValueError(
                f"the encoder's features of {_text(self.found.names[row])!r} are not finite, as "
                "after a training that diverged; use another encoder"
            )

    def _write(self, part: int, features_BF: NDArray[np.float32], files: _MarkedFiles) -> None:
        rows = np.array(self.parts.plan.rows(part))
        bad = files.marks_N[rows] != 0
        corrupt = Skipped()
        for row in rows[bad].tolist():
            named = len(corrupt.first) < NAMED
            corrupt.add(_text(files.names[row]), files.why(row) if named else "")
        names = [_text(name) for name in files.names[rows[~bad]].tolist()]
        self.parts.write(part, names, features_BF, corrupt)
