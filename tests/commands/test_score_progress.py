"""The progress of the score command, on a terminal and elsewhere."""

import io
import re
import sys

import pytest

pytest.importorskip("tqdm")

from marginops.commands.score import progress as progress_file
from marginops.commands.score.progress import Progress


class Clock:
    """Time that passes when told to."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_file, "time", clock)
    monkeypatch.setattr("tqdm.std.time", clock.monotonic)
    return clock


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(clock, capsys):
    progress = Progress(quiet=False)
    progress.start(4_000_000, 1_000_000, 3_000_000)
    clock.now += 4  # Workers start.
    for _ in range(25):
        clock.now += 1
        progress(100_000, 25_600_000)
    progress.close()
    clock.now += 100
    assert capsys.readouterr().err.splitlines() == [
        "resumed: 1,000,000 of 4,000,000 rows are scored already",
        "2.10M of 4.00M rows, 100k rows/s, 25.6MB/s, 00:19 left",
        "3.10M of 4.00M rows, 100k rows/s, 25.6MB/s, 00:09 left",
    ]
    assert (progress.rows, progress.bytes, progress.seconds) == (2_500_000, 640_000_000, 29)
    assert progress.rates == (100_000, 25_600_000)


def test_progress_on_a_terminal_is_a_bar(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(quiet=False)
    progress.start(4_000_000, 0, 4_000_000)
    clock.now += 4
    for _ in range(10):
        clock.now += 1
        progress(100_000, 25_600_000)
    progress.close()
    bars = terminal.getvalue().split("\r")
    assert re.fullmatch(
        r" 25%\|.*\| 1.00M of 4.00M rows, 100k rows/s, 25.6MB/s, 00:30 left\s*", bars[-1]
    ), bars[-1]


def test_progress_of_one_of_several_processes_counts_its_share(clock, capsys):
    progress = Progress(quiet=False)
    progress.start(1000, 100, 350)
    progress(50, 1)
    assert progress.rates is None
    clock.now += 10
    progress(200, 1)
    assert capsys.readouterr().err.splitlines()[1].startswith("350 of 450 rows, 20.0 rows/s")


def test_quiet_progress_counts_and_shows_nothing(clock, capsys):
    progress = Progress(quiet=True)
    progress.start(1000, 500, 500)
    clock.now += 20
    progress(500, 1000)
    progress.close()
    assert capsys.readouterr().err == "" and progress.rows == 500
