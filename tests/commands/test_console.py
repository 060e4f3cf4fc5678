"""The standard streams: what the commands do where they are closed, full or ASCII."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marginops.commands import console

COMMANDS = ["--version", "--help", "demo --help", "doctor --no-build"]


def shell(arguments: str, redirection: str, **variables: str) -> tuple[int, str]:
    """The exit status of the command in a shell, and what it wrote to standard error."""
    line = f"{sys.executable} -m marginops {arguments} {redirection}"
    environment = os.environ | {"MARGINOPS_DISABLE_JIT": "1"} | variables
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_full_output_is_one_line_and_a_reader_that_left_is_none(
    arguments: str, unbuffered: str
) -> None:
    status, error = shell(arguments, "> /dev/full", PYTHONUNBUFFERED=unbuffered)
    message = "marginops: standard output cannot be written: No space left on device\n"
    assert (status, error) == (1, message)
    assert shell(arguments, "| true", PYTHONUNBUFFERED=unbuffered) == (141, "")


def test_closed_streams() -> None:
    message = "marginops: standard output cannot be written: it is closed\n"
    assert shell("--version", ">&-") == (1, message)
    assert shell("--version", ">&- 2>&-") == (1, "")
    assert shell("--version", "2>&- <&- > /dev/null") == (0, "")
    assert shell("demo --updates 0", "2> /dev/full") == (2, "")


def test_a_reader_that_leaves_ends_the_training(tmp_path: Path) -> None:
    arguments = f"observe --epochs 100000 --hidden 4 --output {tmp_path}/figure.png"
    assert shell(arguments, "| head -1 > /dev/null") == (141, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_the_table_is_printed_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    output = tmp_path / "printed"
    files = f"--output {tmp_path}/figure.png --json {tmp_path}/report.json"
    status, error = shell(
        f"demo --updates 3 --seeds 2 {files}",
        f"> {output}",
        LC_ALL="C",
        PYTHONIOENCODING=encoding,
        PYTHONUTF8="0",
    )
    assert (status, error) == (0, "")
    printed = output.read_text(encoding=encoding)
    assert (" +- " if encoding == "ascii" else " ± ") in printed
    assert {path.name for path in tmp_path.iterdir()} == {"printed", "figure.png", "report.json"}
    assert (tmp_path / "report.json").read_bytes().isascii()


def test_interrupted_training_ends_quietly(tmp_path: Path) -> None:
    files = ["--output", str(tmp_path / "figure.png")]
    process = subprocess.Popen(
        [sys.executable, "-m", "marginops", "observe", "--epochs", "100000", *files],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"MARGINOPS_DISABLE_JIT": "1"},
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    # Python ends itself by the signal if it was in an exec() of text, as in the import of a
    # dataclass. A shell reports 130 for both.
    assert process.returncode in (130, -signal.SIGINT)
    assert error == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("1 ± 2 é\udce9", "ascii", rb"1 +- 2 \xe9\udce9"),
        ("1 ± 2 é\udce9", "utf-8", "1 ± 2 é".encode() + rb"\udce9"),
    ],
)
def test_characters_are_replaced(
    text: str, encoding: str, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))

    def body() -> int:
        console.say(text)
        return 0

    assert console.guard(body) == 0
    assert written.getvalue() == expected + b"\n"


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.fail("marginops: a\nb\x1b[31m\udce9: wrong")
    assert capsys.readouterr().err == "marginops: a\\nb\\x1b[31m\\udce9: wrong\n"
