"""The files of the commands: what is refused before the training, and how they are written."""

import json
import math
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from marginops._json import json_bytes
from marginops.commands import output


def test_a_new_file_is_possible_and_nothing_remains_of_the_trial(tmp_path: Path) -> None:
    output.check(tmp_path / "new.json")
    assert not list(tmp_path.iterdir())
    old = tmp_path / "old.json"
    old.write_bytes(b"old")
    output.check(old)
    assert old.read_bytes() == b"old"
    output.check(Path(os.devnull))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/x", "expected a file in an existing folder, got .*; create it first"),
        ("file/x", "got .* \\(Not a directory\\)"),
        ("folder", "expected a file, got the folder "),
        ("socket", "expected a file, got the socket or disk "),
        ("loop", "got .* \\(Too many levels of symbolic links\\)"),
        ("a" * 300, "got .* \\(File name too long\\)"),
        ("a\0b", "got .* \\(.*null"),
        ("/proc/x", "expected a place where a file can be written, got /proc/x "),
    ],
)
def test_what_cannot_be_written_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the address of a socket has to be short
    Path("file").touch()
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        before = sorted(tmp_path.iterdir())
        with pytest.raises(output.OutputError, match=message):
            output.check(Path(name))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without rights")
def test_permissions_are_tried(tmp_path: Path) -> None:
    """A child without rights, because root may write everywhere."""
    locked, protected = tmp_path / "locked", tmp_path / "protected"
    locked.mkdir(mode=0o555)
    protected.touch()
    (locked / "own").touch()
    os.chown(locked / "own", 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    script = f"""
import os
from pathlib import Path
from marginops.commands import output
os.setuid(65534)
for name in ("locked/new", "protected", "locked/own"):
    try:
        output.check(Path({str(tmp_path)!r}) / name)
        output.write(Path({str(tmp_path)!r}) / name, b"new")
        print("written")
    except output.OutputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    new, existing, own = done.stdout.splitlines()
    assert new.startswith("expected a place where a file can be written") and "denied" in new
    assert existing.startswith("expected a file that you may write, got ")
    assert own == "written"
    assert (locked / "own").read_bytes() == b"new"


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "report.json", tmp_path / "link.json"
    output.write(path, b"first")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o640)
    link.symlink_to(path.name)
    with open(path, "rb") as opened:
        output.write(link, b"second")
        assert opened.read() == b"first"
    assert link.is_symlink() and path.read_bytes() == b"second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    monkeypatch.setattr(os, "fchmod", lambda *_: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        output.write(path, b"third")
    assert path.read_bytes() == b"second"
    assert len(list(tmp_path.iterdir())) == 2


def test_same_files_are_found(tmp_path: Path) -> None:
    first = tmp_path / "a"
    assert output.is_same(first, tmp_path / "x" / ".." / "a")
    assert not output.is_same(first, tmp_path / "b")
    first.touch()
    os.link(first, tmp_path / "b")
    assert output.is_same(first, tmp_path / "b")


def test_standard_output_is_not_truncated(tmp_path: Path) -> None:
    script = """
from pathlib import Path
from marginops.commands import output
output.check(Path("/dev/stdout"))
print("before")
output.write(Path("/dev/stdout"), b"report\\n")
print("after")
"""
    printed = tmp_path / "printed"
    with open(printed, "wb") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True)
    assert printed.read_text() == "before\nreport\nafter\n"


def test_json_holds_no_nan() -> None:
    content = json_bytes({"a": [1.5, math.nan, (math.inf,)], "b": "±"})
    assert content.isascii()
    assert json.loads(content) == {"a": [1.5, None, [None]], "b": "±"}
