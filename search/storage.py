"""Where the files of a sweep lie that must outlive the machine it began on: a folder, or a bucket.

Names are paths below the sweep's own place, such as `trials/7/checkpoint_600/checkpoint.pt`. A put
that returns has replaced the whole file. Buckets are pyarrow's: `s3://BUCKET/PREFIX`, `gs://...`;
their credentials are the environment's or the machine's, never a part of what is written down here.
Leaves out when what is saved (`search.trainable`, `search.mirror`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from trainer.atomic import replacing

T = TypeVar("T")

SCHEMES = ("s3", "gs")
ANSWER_S = 5.0
"""For a connection, and for each answer of a bucket, before pyarrow tries again, three times."""
PATIENCE_S = 600.0
"""How long a storage may fail before what waits for it gives up."""
FULL_PATIENCE_S = 20.0
"""The same of a full disk, which seldom mends itself; another trial's end may make room."""
_PLAIN = re.compile(r"[a-z0-9]+://[A-Za-z0-9._/=-]+")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StorageError(Exception):
    """A storage failed for too long; one line says where and why."""


class Storage(Protocol):
    """A sweep's place in a storage. OSErrors mean that it fails now, perhaps not later."""

    uri: str

    def create(self) -> None:
        """Make the place, if it takes that."""

    def save(self, name: str, write: Callable[[Path], None]) -> None:
        """Put what `write` writes to the path that it is given; it replaces whole files itself."""

    def put(self, name: str, content: bytes) -> None:
        """Put a small file."""

    def read(self, name: str) -> bytes:
        """A small file; FileNotFoundError if there is none."""

    def opened(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A file as a path that can be read; FileNotFoundError if there is none."""

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of that name."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Names and bytes of the files below a folder, at any depth; none if it is missing."""

    def delete(self, folder: str) -> None:
        """Remove a folder, which may be missing."""

    def delete_file(self, name: str) -> None:
        """Remove a file, which may be missing."""


class Folder:
    """A place on a file system: the sweep's own folder, or one that several machines share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = str(path)

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def check_there(self) -> None:
        """OSError where the folder is missing: a file system that is not mounted here, or now."""
        if not self.path.is_dir():
            raise OSError(errno.ENOTDIR, f"{self.path} is missing")

    def save(self, name: str, write: Callable[[Path], None]) -> None:
        self.check_there()
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        write(self.path / name)

    def put(self, name: str, content: bytes) -> None:
        self.check_there()
        with replacing(self.path / name) as file:
            file.write(content)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        self.check_there()
        (self.path / name).stat()
        yield self.path / name

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def sizes(self, folder: str) -> dict[str, int]:
        files = [path for path in (self.path / folder).rglob("*") if path.is_file()]
        return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in files}

    def delete(self, folder: str) -> None:
        shutil.rmtree(self.path / folder, ignore_errors=True)

    def delete_file(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


class Bucket:
    """A place in an object store."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._connected: tuple[Any, str] | None = None

    def _at(self, name: str = "") -> tuple[Any, str]:
        """The file system and the path on it of a name."""
        if self._connected is None:
            self._connected = _connected(self.uri)
        files, root = self._connected
        return files, f"{root}/{name}" if name else root

    def create(self) -> None:
        """Nothing: buckets have no folders."""

    def save(self, name: str, write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory(prefix="contrasweep-") as folder:
            path = Path(folder) / Path(name).name
            write(path)
            files, target = self._at(name)
            with path.open("rb") as source, files.open_output_stream(target) as stream:
                shutil.copyfileobj(source, stream, 16 * 2**20)

    def put(self, name: str, content: bytes) -> None:
        files, target = self._at(name)
        with files.open_output_stream(target) as stream:
            stream.write(content)

    def read(self, name: str) -> bytes:
        files, source = self._at(name)
        with files.open_input_stream(source) as stream:
            return bytes(stream.read())

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        files, source = self._at(name)
        with tempfile.TemporaryDirectory(prefix="contrasweep-") as folder:
            path = Path(folder) / Path(name).name
            with files.open_input_stream(source) as stream, path.open("wb") as target:
                shutil.copyfileobj(stream, target, 16 * 2**20)
            yield path

    def exists(self, name: str) -> bool:
        from pyarrow.fs import FileType

        files, path = self._at(name)
        return bool(files.get_file_info(path).type != FileType.NotFound)

    def sizes(self, folder: str) -> dict[str, int]:
        from pyarrow.fs import FileSelector, FileType

        files, path = self._at(folder)
        _, root = self._at()
        found = files.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
        return {
            each.path.removeprefix(f"{root}/"): int(each.size)
            for each in found
            if each.type == FileType.File
        }

    def delete(self, folder: str) -> None:
        files, path = self._at(folder)
        with contextlib.suppress(FileNotFoundError):
            files.delete_dir(path)

    def delete_file(self, name: str) -> None:
        files, path = self._at(name)
        with contextlib.suppress(FileNotFoundError):
            files.delete_file(path)

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "_connected": None}  # each process finds its own credentials


def _connected(uri: str) -> tuple[Any, str]:
    """pyarrow's file system of a bucket, and the path on it."""
    from pyarrow.fs import FileSystem, S3FileSystem, resolve_s3_region

    parts = urlsplit(uri)
    path = f"{parts.netloc}{parts.path}"
    if parts.scheme != "s3":
        files, path = FileSystem.from_uri(uri)
        return files, str(path)
    # By hand for the sake of its time-outs: without them an endpoint that hangs is waited for
    # 288 s at a time, measured. Delayed opening makes one request of three for a small file.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    scheme, _, address = (endpoint or "").rpartition("://")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        region = resolve_s3_region(parts.netloc)
    found = S3FileSystem(
        region=region,
        endpoint_override=address.rstrip("/") or None,
        scheme=scheme or None,
        connect_timeout=ANSWER_S,
        request_timeout=ANSWER_S,
        allow_delayed_open=True,
    )
    return found, path


def storage_at(uri: str) -> Storage:
    """The storage of a URI or path; ValueError in one line for one that there is not."""
    parts = urlsplit(uri)
    if not is_bucket(uri):
        return Folder(Path(uri).expanduser().resolve())
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"storage is a folder or begins with {known}; got {parts.scheme}://...")
    if "@" in parts.netloc or parts.query:
        raise ValueError(
            "storage must carry no credentials and no options, which would be written into the "
            "sweep's files; use the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)"
        )
    if not parts.netloc:
        raise ValueError(f"storage {uri} names no bucket; use {parts.scheme}://BUCKET/FOLDER")
    if not _PLAIN.fullmatch(uri):
        raise ValueError(
            f"{uri} has characters that mean something else in places of buckets; in them and in "
            "the names of sweeps there, use letters, digits and . _ - ="
        )
    return Bucket(uri)


def joined(uri: str, name: str) -> str:
    """The URI of `name` below `uri`."""
    return f"{uri.rstrip('/')}/{name}"


def is_bucket(uri: str) -> bool:
    """Whether a URI or path is no folder."""
    return "://" in uri


def patiently(
    act: Callable[[], T],
    what: str,
    *,
    patience_s: float = PATIENCE_S,
    on_wait: Callable[[str], None] = lambda text: None,
) -> T:
    """`act`, again and again while it raises OSErrors; StorageError once the patience is over.

    `what` names the deed in the error; `on_wait` is told in one line each time that it failed.
    """
    started, delay_s = time.monotonic(), 0.5
    while True:
        try:
            return act()
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            limit_s = min(patience_s, FULL_PATIENCE_S) if error.errno in _FULL else patience_s
            if time.monotonic() - started + delay_s > limit_s:
                raise StorageError(f"cannot {what}: {reason}") from error
            on_wait(f"cannot {what}, tries again: {reason}")
        time.sleep(delay_s)
        delay_s = min(10.0, 2 * delay_s)
