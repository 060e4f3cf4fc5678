"""Runs programs of a build. None of their processes outlives this process or a limit of time."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A shell leads the session of the program. A second shell waits for the end of standard input,
# which comes when this process ends, however it ends, and then kills the session. Without /proc it
# can kill the process group only.
_LEADER = """
end_session() {
  read -r self rest </proc/self/stat || kill -KILL 0
  for round in 1 2 3 4 5 6 7 8 9 10; do
    alive=
    for stat in /proc/[0-9]*/stat; do
      { read -r line <"$stat"; } 2>/dev/null || continue
      pid=${line%% *}
      set -- ${line##*) }
      if [ "$4" = "$$" ] && [ "$pid" != "$self" ] && [ "$1" != Z ]; then
        kill -KILL "$pid" 2>/dev/null && alive=yes
      fi
    done
    [ "$alive" ] || break
  done
}
exec 3<&0
"$@" </dev/null 3<&- &
program=$!
{ read -r line <&3; end_session; } >/dev/null 2>&1 &
guard=$!
wait "$program"
status=$?
kill -KILL "$guard"
exit "$status"
"""

_TICK = 1.0
_KEPT = 1 << 20  # bytes of output that are kept, at its beginning and again at its end


class ProgramError(Exception):
    """A program could not be started, or took too long. The message says which and why."""


@dataclass(frozen=True)
class Finished:
    """The exit status of a program, and what it wrote to standard output and standard error."""

    status: int
    output: str


def run(
    command: Sequence[str],
    *,
    limit: float,
    idle_limit: float | None = None,
    folder: Path = Path("/"),
    environment: Mapping[str, str] | None = None,
    show: Callable[[str], None] | None = None,
) -> Finished:
    """Run a program to its end.

    Args:
        command: The program and its arguments.
        limit: Seconds after which the program is ended.
        idle_limit: Seconds after which the program is ended if it writes nothing, and if all its
            processes only wait and use no processor time. Waiting for a processor or a disk does
            not count.
        folder: The folder in which the program runs. The current folder may no longer exist, and a
            shell would complain of that.
        environment: Variables on top of those of this process.
        show: Receives the output as it comes.

    Raises:
        ProgramError: The program cannot be started, or a limit has been reached.
    """
    with contextlib.ExitStack() as opened:
        try:
            # Not a pipe: writing to a pipe that nobody reads ends a process in which SIGPIPE has
            # its default action.
            here, there = map(opened.enter_context, socket.socketpair())
            child = subprocess.Popen(
                ["/bin/sh", "-c", _LEADER, "sh", *command],
                stdin=there.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "LC_ALL": "C", **(environment or {})},
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise ProgramError(f"{command[0]} cannot be started: {error}") from error
        output = _Output(show)
        try:
            _watch(child, output, limit, idle_limit)
        finally:
            _end(child, here)
    return Finished(child.returncode, output.text())


def _watch(
    child: subprocess.Popen[bytes], output: _Output, limit: float, idle_limit: float | None
) -> None:
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    began = last = time.monotonic()
    idle, used = 0.0, 0
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            finished = child.poll() is not None
            ready = selector.get_map() and selector.select(0 if finished else _TICK)
            if ready and not output.read(child.stdout.fileno()):
                selector.unregister(child.stdout)
            if finished and not ready:
                return
            if not selector.get_map() and not finished:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_TICK)
            now = time.monotonic()
            if now - began > limit:
                raise ProgramError(f"it was ended, because it took longer than {limit:.0f} s")
            # A machine that was suspended in between has not waited for the program.
            idle += min(now - last, 2 * _TICK)
            last = now
            if ready:
                idle = 0.0
            elif idle_limit is not None:
                busy, used_now = _activity(child.pid)
                if busy or used_now != used:
                    idle, used = 0.0, used_now
                elif idle > idle_limit:
                    raise ProgramError(
                        "it was ended, because it used no processor time and wrote nothing for "
                        f"{idle_limit:.0f} s"
                    )


def _activity(session: int) -> tuple[bool, int]:
    """Whether a process of a session runs, or waits for a processor or a disk; and time used.

    Where /proc does not tell, the session counts as busy.
    """
    if not os.path.exists(f"/proc/{session}/stat"):
        return True, 0
    busy, used = False, 0
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(entry.path, "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[3]) == session:
                busy = busy or fields[0] in (b"R", b"D")
                used += sum(map(int, fields[11:15]))
    return busy, used


def _end(child: subprocess.Popen[bytes], standard_input: socket.socket) -> None:
    """Tell the shell to kill the session, if it still runs."""
    assert child.stdout is not None
    # To close the socket is not enough: a process that was forked meanwhile holds it open.
    with contextlib.suppress(OSError):
        standard_input.shutdown(socket.SHUT_WR)
    child.stdout.close()
    child.wait()


class _Output:
    """The beginning and the end of an output, which may be huge and in any encoding."""

    def __init__(self, show: Callable[[str], None] | None) -> None:
        self._show = show
        self._first = bytearray()
        self._last = bytearray()
        self._dropped = 0

    def read(self, file: int) -> bool:
        """Read what there is; False at the end of the file."""
        try:
            piece = os.read(file, 1 << 16)
        except BlockingIOError:
            return True
        if self._show is not None and piece:
            self._show(piece.decode(errors="replace"))
        room = _KEPT - len(self._first)
        self._first += piece[:room]
        self._last += piece[room:]
        if len(self._last) > 2 * _KEPT:
            self._dropped += len(self._last) - _KEPT
            del self._last[:-_KEPT]
        return bool(piece)

    def text(self) -> str:
        """The output, with a note where a part is left out."""
        first, last = (bytes(part).decode(errors="replace") for part in (self._first, self._last))
        note = f"\n[{self._dropped} bytes are left out here]\n" if self._dropped else ""
        return first + note + last
