"""Downloads into the cache, from a server on this machine: complete and checked, or not there."""

import hashlib
import json
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from helpers import file_server
from helpers.file_server import Server
from helpers.processes import PATIENCE, python, wait_until
from marginops._native import places
from marginops._native.trust import RefusedError
from marginops.commands import download
from marginops.commands.download import RemoteFile, Source, fetch
from marginops.commands.idx import DataError

CONTENT = {"a.gz": bytes(range(256)) * 700, "b.gz": b"second file"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with file_server.serve(dict(CONTENT)) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source(server: Server) -> Source:
    files = [
        RemoteFile(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in CONTENT.items()
    ]
    return Source("letters", server.address, files, "do it so")


def stored(cache: Path) -> dict[str, bytes]:
    """The files in the folder of the data set, without the lock."""
    paths = [path for path in (cache / "data/letters").glob("*") if path.name != "lock"]
    return {path.name: path.read_bytes() for path in paths}


def test_files_are_downloaded_once(server: Server, cache: Path) -> None:
    umask = os.umask(0)
    try:
        assert fetch(source(server), quiet=True) == cache / "data/letters"
    finally:
        os.umask(umask)
    assert stored(cache) == CONTENT
    assert server.asked == ["a.gz", "b.gz"]
    for path in (cache, cache / "data", cache / "data/letters", cache / "data/letters/a.gz"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0
    assert fetch(source(server), quiet=True) == cache / "data/letters"
    assert len(server.asked) == 2


def test_a_redirect_is_followed(server: Server, cache: Path) -> None:
    server.answers["a.gz"] = file_server.redirect
    fetch(source(server), quiet=True)
    assert stored(cache) == CONTENT


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            file_server.change,
            "expected the SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}; do it so$",
        ),
        (file_server.cut, "expected 179,200 bytes, got 179,191; do it so$"),
        (file_server.cut_without_length, "179,200 bytes, got 179,191; do it so$"),
        (file_server.endless, "expected 179,200 bytes, got more; do it so$"),
        (
            file_server.missing,
            r"expected the file, got HTTP status 404 \(Not Found\); do it so$",
        ),
        (file_server.empty_answer, "expected an answer, got Remote end closed connection"),
        (file_server.no_http, "expected an answer, got SSH-2.0-server"),
        (file_server.redirect_for_ever, "expected the file, got HTTP status 302 "),
        (file_server.redirect_to_a_file, "expected the file, got HTTP status 302 "),
        (file_server.stall, "expected an answer, got nothing for 0.3 s; do it so$"),
        (file_server.silent, "expected an answer, got nothing for 0.3 s; do it so$"),
        (file_server.drip, "expected an answer, got not complete after 1 s; do it so$"),
    ],
)
def test_a_bad_answer_is_named_and_leaves_nothing(
    answer: file_server.Answer,
    message: str,
    server: Server,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "STALL", 0.3)
    monkeypatch.setattr(download, "LONGEST", 1.0)
    server.answers["a.gz"] = answer
    with pytest.raises(DataError, match=message) as error:
        fetch(source(server), quiet=True)
    assert str(error.value).startswith(f"{server.address}a.gz: ")
    assert "\n" not in str(error.value)
    assert stored(cache) == {}
    # What is complete stays, and the rest is asked for again.
    server.answers = {"b.gz": file_server.missing}
    with pytest.raises(DataError, match=r"b\.gz: expected the file"):
        fetch(source(server), quiet=True)
    assert stored(cache) == {"a.gz": CONTENT["a.gz"]}
    server.answers = {}
    fetch(source(server), quiet=True)
    assert stored(cache) == CONTENT
    assert server.asked[-3:] == ["a.gz", "b.gz", "b.gz"]


def test_no_server_is_named(server: Server, cache: Path) -> None:
    nobody = Source("letters", "http://127.0.0.1:9/", source(server).files, "do it so")
    with pytest.raises(DataError, match=r"^http://127\.0\.0\.1:9/a\.gz: .* Connection refused; do"):
        fetch(nobody, quiet=True)


@pytest.mark.parametrize("damage", ["cut", "changed", "folder"])
def test_a_damaged_file_is_downloaded_again(damage: str, server: Server, cache: Path) -> None:
    folder = fetch(source(server), quiet=True)
    path = folder / "a.gz"
    if damage == "folder":
        path.unlink()
        (path / "inside").mkdir(parents=True)
    else:
        path.write_bytes(CONTENT["a.gz"][:-1] + (b"" if damage == "cut" else b"?"))
    fetch(source(server), quiet=True)
    assert stored(cache) == CONTENT
    assert server.asked == ["a.gz", "b.gz", "a.gz"]


FETCH = """
import json, sys
from marginops.commands.download import RemoteFile, Source, fetch
name, address, files, otherwise = json.loads(sys.argv[1])
print(fetch(Source(name, address, [RemoteFile(*file) for file in files], otherwise), quiet=False))
"""


def arguments(server: Server) -> str:
    one = source(server)
    files = [[file.name, file.size, file.sha256] for file in one.files]
    return json.dumps([one.name, one.address, files, one.otherwise])


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_leaves_no_file_of_that_name(
    sent: int, server: Server, cache: Path
) -> None:
    server.answers["a.gz"] = file_server.stall
    process = python(FETCH, arguments(server))
    wait_until(lambda: any(name.startswith("downloading-") for name in stored(cache)))
    process.send_signal(sent)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    left = stored(cache)
    assert "a.gz" not in left
    # Nobody can clean up after SIGKILL but the next run.
    assert len(left) == (1 if sent == signal.SIGKILL else 0)
    server.answers = {}
    fetch(source(server), quiet=True)
    assert stored(cache) == CONTENT


def test_of_two_runs_one_downloads(server: Server, cache: Path) -> None:
    server.answers["a.gz"] = file_server.stall
    first = python(FETCH, arguments(server))
    wait_until(lambda: server.asked == ["a.gz"])
    second = python(FETCH, arguments(server))
    assert second.stderr is not None
    line = second.stderr.readline()
    assert line == f"marginops: another run fills {cache}/data/letters; waiting for it\n"
    server.released.set()
    for process in (first, second):
        printed, error = process.communicate(timeout=PATIENCE)
        assert (process.returncode, printed, error) == (0, f"{cache}/data/letters\n", "")
    assert stored(cache) == CONTENT
    assert server.asked == ["a.gz", "b.gz"]


def test_a_cache_that_cannot_be_written_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(tmp_path / "file/cache"))
    message = (
        r"^letters: expected a folder for the downloaded files, got none: the cache folder "
        rf"{tmp_path}/file/cache cannot be used \(.*Not a directory.*\); "
        r"set MARGINOPS_CACHE_DIR to a folder where only you may write, or do it so$"
    )
    with pytest.raises(DataError, match=message):
        fetch(source(server), quiet=True)
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", "relative")
    with pytest.raises(
        DataError, match=r"^letters: MARGINOPS_CACHE_DIR: expected an absolute path"
    ):
        fetch(source(server), quiet=True)
    assert server.asked == []


def test_a_full_disk_is_named(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "rename", full_disk)
    with pytest.raises(DataError, match=r"cannot be used \(\[Errno 28\] No space left on device"):
        fetch(source(server), quiet=True)
    assert stored(cache) == {}


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, os.strerror(28))


def test_the_next_place_is_taken(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(places, "candidates", lambda: [tmp_path / "file", tmp_path / "second"])
    assert fetch(source(server), quiet=True) == tmp_path / "second/data/letters"
    assert fetch(source(server), quiet=True) == tmp_path / "second/data/letters"
    assert server.asked == ["a.gz", "b.gz"]


def test_a_folder_that_others_may_write_to_is_refused(server: Server, cache: Path) -> None:
    folder = fetch(source(server), quiet=True)
    folder.chmod(0o777)
    with pytest.raises(DataError, match="expected that only its owner may write to it"):
        fetch(source(server), quiet=True)
    with pytest.raises(RefusedError, match="expected that only its owner may write to it"):
        places.find_data(cache, "letters")


def test_a_filled_cache_need_not_be_writable(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(source(server), quiet=True)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, os.strerror(13))

    # Root may write everywhere.
    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(download.fcntl, "flock", refuse)
    assert fetch(source(server), quiet=True) == folder


@pytest.mark.parametrize(
    ("terminal", "quiet", "shown"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_progress_is_shown_on_a_terminal_unless_quiet(
    terminal: bool,
    quiet: bool,
    shown: bool,
    server: Server,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    fetch(source(server), quiet=quiet)
    error = capsys.readouterr().err
    assert ("downloading letters: 100%" in error and "179k/179k" in error) is shown
    assert shown or error == ""
