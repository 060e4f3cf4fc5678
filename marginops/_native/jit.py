"""Builds a library when it is first used. Another process compiles it, one build at a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from .cache import Cache, say, show
from .plan import Plan, UnavailableError


def is_set(variable: str) -> bool:
    """Whether an environment variable is set to something other than 0, false, no or off."""
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


def build(plan: Plan, cache: Cache) -> None:
    """Compile a library into the cache, under the lock of the cache.

    Raises:
        UnavailableError: The build failed. The message holds the first error of the compiler.
    """
    say(f"compiling the {plan.device_type} kernels ({plan.label}), once for this machine")
    began = time.monotonic()
    with cache.build_folder() as build_folder:
        failed, output = _run(plan, build_folder.path)
        if failed:
            reason = f"the build failed: {_first_error(output)}"
            raise UnavailableError(cache.store_failure(plan, reason, output))
        library = cache.store(plan, build_folder)
    say(f"compiled in {time.monotonic() - began:.0f} s, stored in {library.parent}")


def _run(plan: Plan, folder: Path) -> tuple[bool, str]:
    arguments = {
        "name": plan.name,
        "sources": plan.sources,
        "extra_include_paths": plan.include_paths,
        "extra_cflags": plan.compiler_flags,
        "extra_cuda_cflags": plan.nvcc_flags,
        "build_directory": str(folder),
        "with_cuda": plan.device_type == "cuda",
        "verbose": True,
    }
    job = json.dumps({"python_path": sys.path, "arguments": arguments})
    lines = []
    try:
        # At the end of the block the child's standard input is closed. This ends a running child.
        with subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("build.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | plan.environment,
            start_new_session=True,
            text=True,
            errors="replace",
        ) as child:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(job + "\n")
            child.stdin.flush()
            for line in child.stdout:
                lines.append(line)
                if is_set("MARGINOPS_VERBOSE"):
                    show(line)
            child.wait()
    except OSError as error:
        raise UnavailableError(f"{sys.executable} cannot run the build: {error}") from error
    return child.returncode != 0, "".join(lines)


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|Error: ", line)]
    return (errors or lines[-1:] or ["no output"])[0]
