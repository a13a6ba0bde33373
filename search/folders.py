"""Where a sweep is: its folder, the place of its checkpoints on a storage; where an encoder is."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from search.config import SweepConfig
from search.confirmation import FOLDER
from search.journal import FILE_NAME
from search.locks import LOCK_NAME
from search.mirror import EVENTS
from search.storage import Folder, Storage, joined, storage_at


def sweep_folder(directory: Path) -> Path:
    """`directory`, made absolute; ValueError if no sweep is there."""
    directory = directory.expanduser().resolve()
    if not (directory / FILE_NAME).is_file():
        why = f"it has no {FILE_NAME}" if directory.exists() else "it does not exist"
        raise ValueError(
            f"{directory} is not a sweep's folder: {why}; give the folder of a sweep, as runs/NAME"
        )
    return directory


def encoder_of(model: Path | str) -> Path:
    """The file of an encoder that a user names, made absolute; ValueError where there is none."""
    from trainer.export import encoder_file

    given = Path(model).expanduser()
    if (given / FILE_NAME).is_file():
        raise ValueError(
            f"{given} is a sweep, not an encoder; export one by 'contrasweep export {given}', "
            f"then give {given / 'export'}"
        )
    return encoder_file(given.resolve())


def storage_of(config: SweepConfig, directory: Path, name: str) -> Storage:
    """Where checkpoints lie: in the sweep's own folder, or in its place on the storage."""
    return Folder(directory) if config.storage is None else storage_at(joined(config.storage, name))


def is_running(directory: Path) -> bool:
    """Whether a driver holds the sweep's folder at the moment."""
    lock = FileLock(directory / LOCK_NAME)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def folder_for(place: str, out: Path) -> Path:
    """The folder below which a sweep from a storage belongs: a confirmation's is its sweep's own.

    ValueError if that is not there yet.
    """
    parent, _, name = place.rstrip("/").rpartition("/")
    above, _, sweep = parent.rpartition("/")
    # in a bucket's root, or beside other sweeps, it is a sweep of that name
    if not name.startswith(FOLDER) or above.endswith("/") or not storage_at(parent).sizes(EVENTS):
        return out
    folder = out / sweep
    if not (folder / FILE_NAME).is_file():
        raise ValueError(
            f"{place} is a confirmation, whose sweep is not in {folder}; bring that first by "
            f"'contrasweep resume {parent}'"
        )
    return folder
