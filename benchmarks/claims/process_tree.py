"""Run a command, and measure its time and the memory of all its processes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INTERVAL = 0.05  # seconds between two looks at the memory


@dataclass
class Measured:
    """What a command took."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    above_limit: bool = False
    status: int = 0
    output: str = ""
    errors: str = ""


@dataclass
class _Watch:
    """Looks at the memory of a process and its descendants: the sum of their PSS."""

    root: psutil.Process
    limit: int
    peak: int = 0
    above_limit: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.ended.wait(INTERVAL):
            self.peak = max(self.peak, proportional_set_size(self.root))
            if self.peak > self.limit:
                self.above_limit = True
                _kill(self.root.pid)
                return


def proportional_set_size(root: psutil.Process) -> int:
    """The memory of a process and its descendants in bytes; each shared page counts once."""
    total = 0
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line[:4] == "Pss:")
    return 1024 * total


def run_measured(
    command: list[str], watch_memory: bool, limit: int = sys.maxsize, stdin: str = ""
) -> Measured:
    """Run a command in a session of its own and wait for it.

    Args:
        command: Program and arguments.
        watch_memory: Measure the peak of the memory, which takes some of the processor's time.
        limit: Kill the command once it takes more bytes than this. Only with ``watch_memory``.
        stdin: What the command reads.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    watch = _Watch(psutil.Process(process.pid), limit)
    thread = threading.Thread(target=watch.run)
    try:
        if watch_memory:
            thread.start()
        output, errors = process.communicate(stdin)
        seconds = time.perf_counter() - start
    finally:
        watch.ended.set()
        _kill(process.pid)  # what the command left behind, or all of it after Ctrl+C
        process.wait()
        if watch_memory:
            thread.join()
    return Measured(
        seconds,
        watch.peak if watch_memory else None,
        watch.above_limit,
        process.returncode,
        output,
        errors,
    )


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
