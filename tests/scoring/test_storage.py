import errno
import os
import pickle
import stat
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow as pa
import pyarrow.fs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from marginops.scoring import DataError, OutputError, outputs
from marginops.scoring.storage import Storage, open_input, resolve, shown


@pytest.fixture(params=["local", "file", "memory"])
def location(request, tmp_path):
    if request.param == "memory":
        return f"memory://{tmp_path.name}/folder"
    return {"local": f"{tmp_path}/folder", "file": f"file://{tmp_path}/folder"}[request.param]


def test_files_come_and_go(location):
    storage = pickle.loads(pickle.dumps(Storage(location)))
    assert storage.sizes() == {} and storage.read("a/b") is None and not storage.is_file()
    storage.write("a/b", b"first")
    storage.write("a/b", b"second")
    storage.write("c", b"", durable=False)
    assert storage.sizes() == {"a/b": 6, "c": 0}
    assert storage.sizes("a") == {"a/b": 6} and storage.sizes("b") == {}
    assert storage.size("a/b") == 6 and storage.read("a/b") == b"second"
    with open_input(f"{location}/a/b") as file:
        file.seek(3)
        assert file.read() == b"ond"
    storage.create("c", b"not")
    storage.create("d/e", b"new")
    assert storage.read("c") == b"" and storage.read("d/e") == b"new"
    assert Storage(f"{location}/c").is_file()
    storage.delete("c")
    storage.delete("c")
    assert set(storage.sizes()) == {"a/b", "d/e"}


def test_streams(location):
    storage, table = Storage(location), pa.table({"a": [1, 2]})
    with storage.open_output("a.arrow") as file, pa.ipc.new_file(file, table.schema) as arrow:
        arrow.write_table(table)
        assert file.tell() > 0
    with storage.open_input("a.arrow") as file:
        assert pa.ipc.open_file(file).read_all() == table


def test_a_block_that_fails_leaves_nothing(location):
    storage = Storage(location)
    # Its own error is none of the output, even if it is one of a file system.
    with pytest.raises(OSError, match=r"^my own$") as caught, storage.open_output("a") as file:
        file.write(b"half")
        raise OSError("my own")
    assert type(caught.value) is OSError
    assert storage.sizes() == {}


def test_the_old_file_stays_while_the_new_one_is_written(tmp_path):
    storage = Storage(tmp_path)
    storage.write("a", b"old")
    with storage.open_output("a") as file:
        file.write(b"new")
        assert storage.read("a") == b"old"
    with pytest.raises(ZeroDivisionError), storage.open_output("a") as file:
        file.write(b"half" + bytes(1 // 0))
    assert storage.read("a") == b"new" and storage.sizes() == {"a": 3}


def test_names_hold_nothing_random(tmp_path):
    storage = Storage(tmp_path)
    with storage.open_output("a"):
        (temporary,) = storage.sizes()
        assert outputs.is_temporary(temporary) and not outputs.is_temporary("a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / temporary).write_bytes(b"left")
    storage.delete_temporary_files()
    assert storage.sizes() == {"a": 0}


def test_permissions_are_those_of_any_new_file(tmp_path):
    Storage(tmp_path).write("a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_what_reaches_the_disk_before_a_file_is_there(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        synced.append((kind, (tmp_path / "a").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    storage = Storage(tmp_path)
    storage.create("a", b"1")
    assert synced == [("file", False), ("folder", True)]
    storage.delete("a")
    storage.write("a", b"1")
    assert synced[2:] == [("file", False)]
    storage.write("b", b"1", durable=False)
    assert len(synced) == 3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "got a full disk for {}; finished tasks stay, so free space and run the"),
        (errno.EDQUOT, "got an exhausted quota for {}; finished tasks stay, so free space and run"),
        (errno.EACCES, "got no permission for {}; finished tasks stay, so make it writable and"),
        (errno.EROFS, "got a read-only file system for {}; finished tasks stay, so make it"),
        (errno.EIO, "got [Errno 5] Input/output error for {}; finished tasks stay, so remove the"),
    ],
)
@pytest.mark.parametrize("function", ["makedirs", "fsync", "replace"])
def test_errors_of_the_disk(tmp_path, monkeypatch, code, message, function):
    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    Storage(tmp_path).write("a", b"old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OutputError) as caught:
        Storage(tmp_path).write("a", b"new")
    expected = "output: expected a folder that can be read and written, "
    assert str(caught.value).startswith(expected + message.format(tmp_path / "a"))
    assert Storage(tmp_path).sizes() == {"a": 3} and (tmp_path / "a").read_bytes() == b"old"


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs more rights")
    try:
        storage = Storage(disk)
        storage.write("a", bytes(1000))
        with pytest.raises(OutputError, match=r"got a full disk for .*disk/b; .* free space"):
            storage.write("b", bytes(1 << 20))
        table = pa.table({"a": range(1 << 17)})
        with (
            pytest.raises(OutputError, match=r"got a full disk for .*disk/c"),
            storage.open_output("c") as file,
            pa.ipc.new_file(file, table.schema) as arrow,
        ):
            arrow.write_table(table)
        assert storage.sizes() == {"a": 1000}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("missing", [errno.EPERM, errno.EOPNOTSUPP])
def test_disks_without_hard_links(tmp_path, monkeypatch, missing):
    def link(*names):
        raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr(os, "link", link)
    storage = Storage(tmp_path)
    storage.create("a", b"first")
    storage.create("a", b"second")
    assert storage.sizes() == {"a": 5} and storage.read("a") == b"first"


def test_of_several_that_create_a_file_one_does(tmp_path):
    start = threading.Barrier(4)

    def create(name):
        storage = Storage(tmp_path)
        for number in range(25):
            start.wait()
            storage.create(f"{number}", name * 1000)
        return [storage.read(f"{number}") for number in range(25)]

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(create, (b"a", b"b", b"c", b"d"))
    assert all(contents == first for contents in others)
    assert {content[1:] for content in first} <= {name * 999 for name in (b"a", b"b", b"c", b"d")}
    assert len(os.listdir(tmp_path)) == 25


class CachingFileSystem(MemoryFileSystem):
    """It lists a folder once, as file systems of object stores do."""

    protocol = "caching"
    store, pseudo_dirs, listed = {}, [""], {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("caching://"))

    def find(self, path, *arguments, **options):
        if path not in self.listed:
            self.listed[path] = super().find(path, *arguments, **options)
        return self.listed[path]

    def invalidate_cache(self, path=None):
        self.listed.clear()


def test_files_of_other_machines_are_seen():
    fsspec.register_implementation("caching", CachingFileSystem, clobber=True)
    storage = Storage("caching://folder")
    storage.write("a", b"1")
    assert storage.sizes() == {"a": 1}
    CachingFileSystem.store["/folder/b"] = CachingFileSystem.store["/folder/a"]
    assert "/folder/b" not in storage.filesystem.handler.fs.find("/folder")
    assert storage.sizes() == {"a": 1, "b": 1}


def test_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    local = pyarrow.fs.LocalFileSystem
    for location, path in (
        ("a/../b c", f"{tmp_path}/b c"),
        (tmp_path / "b%20c", f"{tmp_path}/b%20c"),
        ("~/a", "/home/somebody/a"),
        (f"file://{tmp_path}/b%20c", f"{tmp_path}/b c"),
    ):
        assert isinstance(resolve(location)[0], local) and resolve(location)[1] == path
    filesystem, path = resolve("s3://bucket/a%20b?region=eu-west-1&scheme=http")
    assert isinstance(filesystem, pyarrow.fs.S3FileSystem) and path == "bucket/a b"


@pytest.mark.parametrize("url", ["unheard://a", "s3://b/ c", "file://relative", "github://a"])
def test_places_that_nobody_knows(url):
    with pytest.raises(
        DataError, match=f"^{url}: expected a path, or a URL that pyarrow or fsspec"
    ):
        resolve(url)


def test_errors_hide_keys():
    assert shown("/a?b@c") == "/a?b@c"
    assert shown("s3://key:secret@bucket/a?region=b") == "s3://bucket/a"
    assert shown("s3://bucket/a@b") == "s3://bucket/a@b"
    assert shown("https://name:p@ss@host:80/a") == "https://host:80/a"
    assert shown("s3://key:se/cret@bucket/a") == "s3://bucket/a"
    assert shown("hdfs://host:8020/a@b") == "hdfs://host:8020/a@b"
    storage = Storage("s3://key:secret@bucket/a?region=b")
    assert storage.full_name("run.json") == "s3://bucket/a/run.json"


@pytest.mark.parametrize(
    ("location", "public"),
    [
        ("s3://key:sec/ret@bucket/a", "s3://bucket/a"),
        ("unheard://key:secret@bucket/a?token=secret", "unheard://bucket/a"),
    ],
)
def test_errors_of_libraries_hide_keys(location, public):
    with pytest.raises(DataError, match=f"^{public}: expected ") as caught:
        resolve(location)
    assert "secret" not in str(caught.value) and "sec/ret" not in str(caught.value)
