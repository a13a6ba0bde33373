"""Storages: one suite for folders and buckets, against a real S3 server on loopback."""

import errno
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.storage import Bucket, Folder, Storage, StorageError, patiently, storage_at

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """`s3://...` on moto's server, with its credentials in the environment."""
    pytest.importorskip("moto", reason="moto serves S3 here")
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for _ in range(240):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.25)
        boto3.client("s3").create_bucket(Bucket="sweeps")
        yield "s3://sweeps"
    server.kill()
    server.wait()


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        folder = Folder(tmp_path / "kept")
        folder.create()
        return folder
    return storage_at(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def test_what_is_kept_is_found_again(storage: Storage) -> None:
    assert storage.sizes("") == {}
    assert not storage.exists("a")
    storage.put("a/one.txt", b"1")
    storage.put("a/one.txt", b"11")
    storage.save("a/b/two.bin", lambda path: path.write_bytes(b"2" * 1000) and None)
    storage.put("top", b"")
    assert storage.sizes("") == {"a/one.txt": 2, "a/b/two.bin": 1000, "top": 0}
    assert storage.sizes("a/b") == {"a/b/two.bin": 1000}
    assert storage.read("a/one.txt") == b"11"
    with storage.opened("a/b/two.bin") as path:
        assert path.read_bytes() == b"2" * 1000
    assert storage.exists("a/b")
    again = pickle.loads(pickle.dumps(storage))
    assert again.read("a/one.txt") == b"11"


def test_what_is_deleted_is_gone_and_may_have_been_so(storage: Storage) -> None:
    storage.put("a/one.txt", b"1")
    storage.put("b", b"1")
    for _ in range(2):
        storage.delete("a")
        storage.delete_file("b")
        assert not storage.exists("a")
        assert storage.sizes("") == {}
    with pytest.raises(FileNotFoundError):
        storage.read("b")
    with pytest.raises(FileNotFoundError), storage.opened("a/one.txt"):
        pass


def test_a_bucket_that_is_not_there_is_an_os_error(bucket: str) -> None:
    with pytest.raises(OSError, match="bucket"):
        Bucket("s3://no-such-bucket/x").put("a", b"1")


def test_a_shared_folder_that_is_not_mounted_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    there = Folder(tmp_path / "no")
    with pytest.raises(OSError, match="is missing") as raised, there.opened("x"):
        pass
    assert not isinstance(raised.value, FileNotFoundError)
    with pytest.raises(OSError, match="is missing"):
        there.put("x", b"")
    with pytest.raises(OSError, match="is missing"):
        there.save("x/y", Path.touch)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://host/x", r"begins with s3://, gs://; got ftp://"),
        ("s3://key:secret@bucket/x", "must carry no credentials"),
        ("s3://bucket/x?secret_key=hunter2", "must carry no credentials"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/run#1", "use letters, digits"),
        ("s3://bucket/run%41", "use letters, digits"),
        ("s3://bucket/my sweep", "use letters, digits"),
    ],
)
def test_other_places_are_refused_in_one_line(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        storage_at(uri)
    assert "hunter2" not in str(raised.value)
    assert "secret@" not in str(raised.value)


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def fail(code: int) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(StorageError, match=r"^cannot save x: .*reset by peer"):
        patiently(lambda: fail(errno.ECONNRESET), "save x", patience_s=2, on_wait=tries.append)
    assert len(tries) == 2
    assert "tries again" in tries[0]

    left = [OSError("once"), OSError("twice")]

    def third_time() -> str:
        if left:
            raise left.pop()
        return "there"

    assert patiently(third_time, "read x") == "there"


def test_a_new_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    from search.config import write_atomically

    before = os.umask(0o027)
    try:
        Folder(tmp_path).put("a/b", b"")
        write_atomically(tmp_path / "c", "")
    finally:
        os.umask(before)
    assert [oct((tmp_path / name).stat().st_mode)[-3:] for name in ("a", "a/b", "c")] == [
        "750",
        "640",
        "640",
    ]
