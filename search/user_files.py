"""The user's own code in a sweep: their space and their losses, kept beside what came of them.

Files are copied into the sweep's folder with their hashes; workers read losses from the copies,
so that a node needs the sweep's folder only, and `resume` refuses what has changed since.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.config import write_atomically
from search.confirmation import ConfirmationSpace

if TYPE_CHECKING:
    from spaces import Space
    from trainer.config import TrainConfig

LOSS_COPY = "loss.py"


@dataclass(frozen=True)
class LossFile:
    """A file of the user's that trials take their loss from, and its copy in a sweep's folder."""

    path: str
    """As the loss's reference has it, before the colon."""
    original: str
    """Where that was when the trials began, as an absolute path."""
    copy: str
    sha256: str


def space_file(space: Space) -> Path | None:
    """The file of a user's own space; None for a built-in one, whose version is the package's.

    A confirmation's is in its configuration.
    """
    if isinstance(space, ConfirmationSpace):
        return None
    function: Any = inspect.unwrap(space)
    if getattr(function, "__module__", "").partition(".")[0] == "spaces":
        return None
    try:
        source = inspect.getsourcefile(function)
    except TypeError:  # a callable object: look for the file of its class
        source = inspect.getsourcefile(type(function))
    return None if source is None else Path(source)


def sha256(path: Path | None) -> str | None:
    """Of a file's bytes; None for no file."""
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def loss_files(refs: Iterable[str]) -> tuple[LossFile, ...]:
    """The files among references of losses, each once; named loss.py, loss-2.py, ... in copies."""
    from trainer.losses import loss_file

    found: dict[str, LossFile] = {}
    for ref in refs:
        path = ref.rpartition(":")[0]
        file = loss_file(ref)
        if file is not None and path.endswith(".py") and path not in found:
            copy = LOSS_COPY if not found else f"loss-{len(found) + 1}.py"
            found[path] = LossFile(path, str(file), copy, str(sha256(file)))
    return tuple(found.values())


def copy_loss_files(files: Iterable[LossFile], folder: Path) -> None:
    """Write each file's copy into the folder."""
    for file in files:
        write_atomically(folder / file.copy, Path(file.original).read_bytes())


def in_copies(ref: str, files: Iterable[LossFile], folder: Path) -> str:
    """The reference of the same loss in the folder's copy; any other reference as it is."""
    path, _, function = ref.rpartition(":")
    copies = {file.path: file.copy for file in files}
    return f"{folder / copies[path]}:{function}" if path in copies else ref


def with_copied_loss(config: TrainConfig, files: Iterable[LossFile], folder: Path) -> TrainConfig:
    """The configuration with loss and head taken from the folder's copy, if of one of the files."""
    copies = {name: in_copies(getattr(config, name), files, folder) for name in ("loss", "head")}
    return config.model_copy(update=copies)


def check_loss_files(files: Iterable[LossFile], folder: Path, *, originals: bool = True) -> None:
    """ValueError if a copy has changed, or with `originals` a file that still exists.

    What goes on is refused when its author changed the file, who would expect it to count.
    """
    for file in files:
        copy = folder / file.copy
        if not copy.exists():
            raise ValueError(f"{copy}, the loss of these trials, is gone; restore it")
        for path in (copy, Path(file.original)) if originals else (copy,):
            if path.exists() and sha256(path) != file.sha256:
                raise ValueError(
                    f"the loss in {path} has changed since the trials began; restore it or start "
                    "anew"
                )


def to_json(files: Iterable[LossFile]) -> list[dict[str, str]]:
    """As the journal holds them."""
    return [asdict(file) for file in files]


def from_json(recorded: Iterable[dict[str, str]]) -> tuple[LossFile, ...]:
    """As the journal held them."""
    return tuple(LossFile(**entry) for entry in recorded)
