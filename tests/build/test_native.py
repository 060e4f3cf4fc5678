"""Building, caching and loading the native libraries, and what happens when that fails."""

from __future__ import annotations

import io
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from helpers.native_sources import expect_reference, new_loader, write_tiny
from helpers.processes import PATIENCE, alive, python, wait_until
from marginops._native import jit, plan, recipe, toolchain
from marginops._native.loader import _obstacle as obstacle

LOAD = """
import sys
from pathlib import Path
from marginops._native.loader import Loader
loader = Loader(Path(sys.argv[1]), Path(sys.argv[1]))
loader.load("cpu")
print(loader.outcome("cpu").implementation)
"""
FIRST_OP = """
import os, sys
import torch, marginops
from marginops import _native

def first_op():
    scores = torch.tensor([3.0, 1.0, float("nan"), 2.0])
    answers = [marginops.select_smallest(scores, 3).indices.tolist() for _ in range(2)]
    answers.append(_native.loader.outcome("cpu").implementation)
    os.write(1, (";".join(map(str, answers)) + "\\n").encode())

start, go = os.pipe()
children = []
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(start, 1)
        first_op()
        os._exit(0)
    children.append(child)
os.close(go)
for child in children:
    os.waitpid(child, 0)
if not children:
    first_op()
"""


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(folder))
    for variable in ("MARGINOPS_DISABLE_JIT", "MARGINOPS_VERBOSE", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    return folder


def test_second_process_takes_the_cached_library(
    tiny: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = new_loader(tiny)
    assert first.load("cpu")
    outcome = first.outcome("cpu")
    assert outcome.implementation == "built now"
    assert outcome.build_info["families"] == ["tiny"]
    said = capfd.readouterr().err
    assert "compiling the cpu kernels" in said
    assert str(outcome.library.parent) in said

    monkeypatch.setattr(jit, "build", None)
    second = new_loader(tiny)
    assert second.load("cpu")
    assert second.outcome("cpu").implementation == "cached"
    assert capfd.readouterr().err == ""


def test_killed_build_harms_nobody(tiny: Path, cache_folder: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    compiler = tmp_path / "slow-g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *tiny.cpp*)\n'
        f"if mkdir {started}; then echo $$ > {started}/pid; sleep 600; fi;;\n"
        'esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    victim = python(LOAD, tiny, CXX=str(compiler))
    wait_until(lambda: (started / "pid").exists() or victim.poll() is not None)
    victim.kill()
    victim.wait()
    left = list(cache_folder.glob("*/building-*"))
    assert left

    survivor = python(LOAD, tiny, CXX=str(compiler))
    output, errors = survivor.communicate(timeout=PATIENCE)
    assert output.strip() == "built now", errors
    assert not list(cache_folder.glob("*/building-*"))

    orphan = int((started / "pid").read_text())
    wait_until(lambda: not alive(orphan))


def test_compile_error_is_the_reason(tiny: Path, cache_folder: Path) -> None:
    write_tiny(tiny, kernel="#error this cannot compile")
    expect_reference(new_loader(tiny), "tiny.cpp:1:2: error: .*this cannot compile")
    (log,) = cache_folder.glob("*/*.log")
    assert "ninja" in log.read_text()
    assert not list(cache_folder.glob("*/building-*"))


@pytest.mark.parametrize("closed", [True, False])
def test_build_needs_no_standard_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream if closed else None)
    monkeypatch.setenv("MARGINOPS_VERBOSE", "1")
    assert new_loader(tiny).load("cpu")


def test_library_that_does_not_load_is_the_reason(tiny: Path) -> None:
    write_tiny(tiny, kernel="int absent(); int tiny = absent();")
    expect_reference(
        new_loader(tiny), "intact and does not load: .*undefined symbol.*absent.*; .* delete "
    )


def test_threads_share_one_attempt(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = new_loader(tiny)
    attempts = []
    resolve = loader._resolve

    def slow(device_type: str, build: bool) -> object:
        attempts.append(device_type)
        time.sleep(0.2)
        return resolve(device_type, build)

    monkeypatch.setenv("MARGINOPS_DISABLE_JIT", "1")
    monkeypatch.setattr(loader, "_resolve", slow)
    threads = [threading.Thread(target=loader.load, args=("cpu",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert attempts == ["cpu"]


def test_process_forked_during_a_build_does_not_hang(tiny: Path) -> None:
    code = """
import os, sys, threading
from pathlib import Path
from marginops._native.loader import Loader
loader = Loader(Path(sys.argv[1]), Path(sys.argv[1]))
held = threading.Event()
def hold():
    with loader._lock:
        held.set()
        threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
if os.fork() == 0:
    os._exit(loader.load("mps"))
_, status = os.wait()
print(status, flush=True)
os._exit(0)
"""
    forking = python(code, tiny)
    try:
        output, errors = forking.communicate(timeout=PATIENCE)
    finally:
        forking.kill()
    assert output.strip() == "0", errors


def test_import_builds_nothing(cache_folder: Path) -> None:
    process = python("import marginops, marginops.commands.cli")
    _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "")
    assert not cache_folder.exists()


def test_op_without_a_compiler_gives_the_reference_and_one_warning() -> None:
    process = python(FIRST_OP, 0, CXX="/nonexistent")
    output, errors = process.communicate(timeout=PATIENCE)
    assert output == "[1, 3, 0];[1, 3, 0];reference\n", errors
    assert errors.count("NativeUnavailableWarning") == 1
    assert "CXX: expected" in errors


@pytest.mark.slow
def test_sixteen_processes_build_once(cache_folder: Path) -> None:
    output, errors = python(FIRST_OP, 16).communicate(timeout=400)
    expected = ["[1, 3, 0];[1, 3, 0];built now"] + ["[1, 3, 0];[1, 3, 0];cached"] * 15
    assert sorted(output.splitlines()) == expected, errors
    assert errors.count("compiling the cpu kernels") == 1
    (library,) = cache_folder.rglob("*.so")
    assert obstacle(library, "cpu", plan.csrc_folder()) is None

    output, errors = python(FIRST_OP, 0).communicate(timeout=PATIENCE)
    assert (output, errors) == (f"{expected[-1]}\n", "")


def test_interrupted_build_is_tried_again(tiny: Path, cache_folder: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "slow-g++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-c*) touch {tmp_path}/on; sleep 600;; esac\nc++ "$@"\n'
    )
    compiler.chmod(0o755)
    process = python(LOAD, tiny, CXX=str(compiler))
    wait_until(lambda: (tmp_path / "on").exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert "KeyboardInterrupt" in errors
    assert not list(cache_folder.glob("*/building-*"))
    assert new_loader(tiny).load("cpu")


@pytest.mark.slow
def test_cuda_library_builds_and_loads() -> None:
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is built without CUDA")
    try:
        toolchain.find_cuda_toolkit()
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))
    code = """
from marginops import _native
print(_native.load("cuda"))
print(*_native.loader.outcome("cuda").build_info["families"])
"""
    archs = {} if torch.cuda.is_available() else {"MARGINOPS_CUDA_ARCH_LIST": "9.0"}
    output, errors = python(code, **archs).communicate(timeout=500)
    families = " ".join(recipe.families(plan.csrc_folder(), "cuda"))
    assert output.splitlines() == ["True", families], errors
