"""Builds a library when it is first used, one build at a time. ninja runs the compilers."""

from __future__ import annotations

import os
import re
import struct
import time
from pathlib import Path

from . import architectures, ninja_file, process, toolchain
from .cache import Cache, say, show
from .plan import Plan, UnavailableError
from .trust import path_of_open

# Seconds. A compiler that waits for something that never comes is ended by the first limit. The
# second one is for a build on a slow machine for many GPU architectures.
IDLE_LIMIT = 45.0
LIMIT = 4 * 3600.0


class _BuildError(Exception):
    """A build failed: its reason, and the output of ninja and the compilers."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def is_set(variable: str) -> bool:
    """Whether an environment variable is set to something other than 0, false, no or off."""
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


def build(plan: Plan, cache: Cache) -> None:
    """Compile a library into the cache, under the lock of the cache.

    Raises:
        UnavailableError: The build failed. The message holds the first error of the compiler.
    """
    try:
        ninja = [toolchain.find_ninja(), "-v", "-j", str(_jobs(len(plan.sources)))]
        if plan.toolkit is not None:
            architectures.check_archs(plan.archs, plan.toolkit)
    except toolchain.ToolchainError as error:
        raise UnavailableError(str(error)) from error
    say(f"compiling the {plan.device_type} kernels ({plan.label}), once for this machine")
    began = time.monotonic()
    with cache.build_folder() as build_folder:
        # This path is for this process and for the working directory of its children.
        folder = path_of_open(build_folder.descriptor, build_folder.path)
        try:
            _compile(plan, folder, ninja)
        except toolchain.ToolchainError as error:
            raise UnavailableError(str(error)) from error
        except _BuildError as error:
            reason = cache.store_failure(plan, f"the build failed: {error}", error.output)
            raise UnavailableError(reason) from error
        library = cache.store(plan, build_folder)
    say(f"compiled in {time.monotonic() - began:.0f} s, stored in {library.parent}")


def _jobs(files: int) -> int:
    """The number of files to compile at once. As in ninja, 0 stands for all."""
    wanted = os.environ.get("MAX_JOBS", "").strip()
    if not wanted:
        return max(1, min(files, (os.cpu_count() or 1) + 2))
    if not re.fullmatch("[0-9]+", wanted):
        raise toolchain.ToolchainError(f"MAX_JOBS: expected a number such as 4, got {wanted}")
    return min(files, int(wanted) or files)


def _compile(plan: Plan, folder: Path, ninja: list[str]) -> None:
    """Compile in the folder, for the baseline if the compiler knows no better instruction set."""
    ninja_file.write(plan, folder)
    status, output = _run(folder, ninja)
    if status != 0 and plan.compiler_flags != plan.baseline_flags and "x86-64-v" in _error(output):
        say(f"{plan.compiler.path} does not know {plan.label}, so it compiles for any processor")
        ninja_file.write(plan, folder, baseline=True)
        status, output = _run(folder, ninja)
    library = folder / f"{plan.name}.so"
    # The status is unknown (0) in a process that does not let its children be waited for.
    if status != 0 or re.search("^FAILED: ", output, re.MULTILINE):
        old = plan.compiler.too_old
        raise _BuildError(f"{old}; {_error(output)}" if old else _error(output), output)
    if not _is_whole(library):
        raise _BuildError(f"{plan.compiler.path} reports no error, but makes no library", output)


def _run(folder: Path, ninja: list[str]) -> tuple[int, str]:
    try:
        done = process.run(
            ninja,
            limit=LIMIT,
            idle_limit=IDLE_LIMIT,
            folder=folder,
            # Compilers make their temporary files in this folder, which is removed.
            environment={"TMPDIR": "."},
            show=show if is_set("MARGINOPS_VERBOSE") else None,
        )
    except process.ProgramError as error:
        raise _BuildError(str(error)) from error
    return done.status, done.output


def _error(output: str) -> str:
    """The first error of the first command that failed."""
    # ninja writes "FAILED: <target>", the command, and what the command has written.
    failed = re.split(r"^FAILED: .*\n.*\n", output, maxsplit=1, flags=re.MULTILINE)[-1]
    own_words = r"^FAILED: |^ninja: build stopped|\[\d+/\d+\] "
    lines = re.split(own_words, failed, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    lines = [line for line in lines if line.strip()]
    # collect2 only repeats that the linker has failed, after the linker's own words.
    errors = [line for line in lines if re.search(r"\berror\b(?!: ld returned)|Error: ", line)]
    return toolchain.first_line((errors or lines or ["the compiler fails without a word"])[0])


def _is_whole(library: Path) -> bool:
    """Whether a library is an ELF file with all its sections. To load a part may crash."""
    try:
        content = library.read_bytes()
        sections, size, count = struct.unpack_from("=40xQ10xHH", content)
    except (OSError, struct.error):
        return False
    return content[:4] == b"\x7fELF" and sections + size * count <= len(content)
