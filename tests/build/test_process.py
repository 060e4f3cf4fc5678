"""Programs of a build end with this process, and when they no longer do anything."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.processes import INSTALLED, alive, wait_until
from marginops._native import process


def shell(script: str, **options: float) -> process.Finished:
    return process.run(["/bin/sh", "-c", script], **{"limit": 60.0, **options})


def test_status_and_output() -> None:
    done = shell("echo out; echo err >&2; printf '\\351'; exit 7")
    assert (done.status, done.output) == (7, "out\nerr\n\N{REPLACEMENT CHARACTER}")
    assert shell("kill -9 $$").status == 128 + signal.SIGKILL
    missing = process.run(["/nonexistent/program"], limit=60)
    assert missing.status == 127
    assert "/nonexistent/program" in missing.output


def test_folder_and_environment(tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", "pwd; echo $COLOUR $LC_ALL"]
    done = process.run(command, limit=60, folder=tmp_path, environment={"COLOUR": "blue"})
    assert done.output.split() == [str(tmp_path.resolve()), "blue", "C"]


def test_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(process.ProgramError, match=r"true cannot be started: .*gone"):
        process.run(["true"], limit=60, folder=tmp_path / "gone")


def test_huge_output_keeps_both_ends() -> None:
    done = shell("echo first; head -c 9000000 /dev/zero | tr '\\0' x; echo; echo last")
    assert done.output.startswith("first\n")
    assert done.output.endswith("\nlast\n")
    assert "bytes are left out here" in done.output
    assert len(done.output) < 4_000_000


@pytest.mark.parametrize(
    "script",
    [
        "sleep 100",
        "exec >&- 2>&-; sleep 100",
        "trap '' TERM INT HUP; sleep 100 & sleep 100",
        "kill -STOP $$",
    ],
    ids=["waits", "closes its output", "ignores signals", "stops"],
)
def test_idle_program_is_ended(script: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(process.ProgramError, match="no processor time and wrote nothing for 2 s"):
        shell(f"echo $$ >{tmp_path}/pid; {script}", idle_limit=2.0)
    assert time.monotonic() - began < 30
    wait_until(lambda: not alive(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize(
    "script",
    ["for i in 1 2 3 4; do sleep 1; echo; done", "timeout 4 sh -c 'while :; do :; done'; true"],
    ids=["writes", "computes"],
)
def test_busy_program_is_not_ended(script: str) -> None:
    assert shell(script, idle_limit=3.0).status == 0


def test_activity_of_a_session() -> None:
    """A program that waits for a processor is busy, though it uses no time."""
    for script, busy in (("while :; do :; done", True), ("exec sleep 600", False)):
        child = subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True)
        try:
            wait_until(lambda child=child, busy=busy: process._activity(child.pid)[0] is busy)
        finally:
            child.kill()
            child.wait()


def test_limit_holds_for_busy_programs() -> None:
    with pytest.raises(process.ProgramError, match="took longer than 2 s"):
        shell("while :; do :; done", limit=2.0)


def test_program_works_where_children_are_not_waited_for() -> None:
    """Where SIGCHLD is ignored, the kernel tells no status. The program does not ignore it."""
    code = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    code += "print(process.run(['sh', '-c', 'sh -c \"exit 5\"; echo $?'], limit=60).output)"
    done = run_python(code)
    assert done.stdout.strip() == "5", done.stderr


def run_python(code: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-c", f"from marginops._native import process\n{code}"],
        env=os.environ | {"PYTHONPATH": INSTALLED},
        capture_output=True,
        text=True,
    )


def test_program_runs_where_a_broken_pipe_ends_the_process() -> None:
    code = "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
    done = run_python(code + "print([process.run(['true'], limit=60).status for _ in range(20)])")
    assert done.stdout == f"{[0] * 20}\n", (done.returncode, done.stderr)


def test_program_runs_and_ends_without_proc() -> None:
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*hide, "true"]).returncode != 0:
        pytest.skip("this user cannot hide /proc")
    done = run_python(
        "import time; began = time.monotonic()\n"
        "print(process.run(['sh', '-c', 'sleep 3; exit 5'], limit=60, idle_limit=1).status)\n"
        "try: process.run(['sleep', '600'], limit=1)\n"
        "except process.ProgramError as error: print(error, time.monotonic() - began < 60)",
        *hide,
    )
    assert done.stdout == "5\nit was ended, because it took longer than 1 s True\n", done.stderr


@pytest.mark.parametrize("event", [signal.SIGKILL, signal.SIGINT])
def test_program_ends_with_this_process(tmp_path: Path, event: signal.Signals) -> None:
    """Neither the program nor what it has started outlives a process that is killed."""
    new, pids = tmp_path / "new", tmp_path / "pids"
    script = f"trap '' TERM; sleep 600 & echo $! $$ >{new}; mv {new} {pids}; wait"
    code = (
        f"from marginops._native import process; process.run(['sh', '-c', {script!r}], limit=600)"
    )
    environment = os.environ | {"PYTHONPATH": INSTALLED}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_until(pids.exists)
    numbers = [int(text) for text in pids.read_text().split()]
    assert all(map(alive, numbers))
    parent.send_signal(event)
    parent.wait(60)
    wait_until(lambda: not any(map(alive, numbers)))
