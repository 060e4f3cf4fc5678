"""Building, caching and loading the native libraries, and what happens when that fails."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import marginops
from marginops._native import NativeUnavailableWarning, jit, plan, recipe, toolchain
from marginops._native.cache import Cache
from marginops._native.loader import Loader
from marginops._native.loader import _obstacle as obstacle
from native_sources import write_tiny

INSTALLED = Path(marginops.__file__).resolve().parents[1]
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


def python(code: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(INSTALLED), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(folder))
    for variable in ("MARGINOPS_DISABLE_JIT", "MARGINOPS_VERBOSE", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "csrc")


def new_loader(csrc: Path) -> Loader:
    """A loader as in a new process, and without libraries built ahead of time."""
    return Loader(csrc, installed=csrc)


def expect_reference(loader: Loader, reason: str) -> None:
    """One warning, which gives the reason, at the first call only."""
    with pytest.warns(NativeUnavailableWarning, match=reason) as caught:
        assert not loader.load("cpu")
    assert len(caught) == 1
    assert "marginops doctor" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not loader.load("cpu")
    assert loader.outcome("cpu").implementation == "reference"


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
    began = time.monotonic()
    assert second.load("cpu")
    assert time.monotonic() - began < 2
    assert second.outcome("cpu").implementation == "cached"
    assert capfd.readouterr().err == ""


def test_damaged_library_is_built_again(tiny: Path) -> None:
    assert new_loader(tiny).load("cpu")
    the_plan = plan.make_plan("cpu", tiny)
    library = Cache().find(the_plan)
    assert library is not None
    facts = library.with_suffix(".json")
    content, described = library.read_bytes(), facts.read_text()
    damages = {
        library: [content[: len(content) // 2], b"", content[:-1] + b"?"],
        facts: [b"", b"{}", described.replace('"size": ', '"size": 1').encode()],
    }
    for file, variants in damages.items():
        whole = file.read_bytes()
        for damaged in variants:
            replace(file, damaged)
            assert Cache().find(the_plan) is None
        file.unlink()
        assert Cache().find(the_plan) is None
        replace(file, whole)
    assert Cache().find(the_plan) == library

    replace(library, content[:1000])
    loader = new_loader(tiny)
    assert loader.load("cpu")
    assert loader.outcome("cpu").implementation == "built now"
    assert Cache().find(the_plan) == library


def replace(file: Path, content: bytes) -> None:
    """Puts another file in its place: writing into a loaded library would end this process."""
    fresh = file.with_name("fresh")
    fresh.write_bytes(content)
    fresh.replace(file)


def test_killed_build_harms_nobody(tiny: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    compiler = tmp_path / "slow-g++"
    compiler.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *tiny.cpp*) if mkdir {started}; then echo $$ > {started}/pid; sleep 60; fi;;'
        '\nesac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    victim = python(LOAD, tiny, CXX=str(compiler))
    deadline = time.monotonic() + 60
    while not (started / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.kill()
    victim.wait()
    left = list(Cache().folder.glob("building-*"))
    assert left

    began = time.monotonic()
    survivor = python(LOAD, tiny, CXX=str(compiler))
    output, errors = survivor.communicate(timeout=60)
    assert output.strip() == "built now", errors
    assert time.monotonic() - began < 30
    assert not list(Cache().folder.glob("building-*"))

    orphan = int((started / "pid").read_text())
    while time.monotonic() < began + 30 and alive(orphan):
        time.sleep(0.05)
    assert not alive(orphan)


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    with contextlib.suppress(OSError):
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_cache_below_a_file(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    expect_reference(new_loader(tiny), "file/cache.* cannot be used .*MARGINOPS_CACHE_DIR")


def test_cache_without_permission(tiny: Path, cache_folder: Path) -> None:
    cache_folder.mkdir(mode=0o500)
    if os.access(cache_folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    expect_reference(new_loader(tiny), "cannot be used .*Permission denied")


def test_missing_compiler(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    expect_reference(new_loader(tiny), "no C.. compiler: CXX=/nonexistent/g.. cannot be run")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    expect_reference(new_loader(tiny), "no C.. compiler: install g.. or")


def test_compile_error_is_the_reason(tiny: Path) -> None:
    since = time.time() - 1
    write_tiny(tiny, kernel="#error this cannot compile")
    expect_reference(new_loader(tiny), "tiny.cpp:1:2: error: .*this cannot compile")
    the_plan = plan.make_plan("cpu", tiny)
    log = Cache().failure_log(the_plan)
    assert "ninja" in log.read_text()
    assert not list(Cache().folder.glob("building-*"))

    # Whoever waited meanwhile gets the same answer without another attempt.
    began = time.monotonic()
    with pytest.raises(plan.UnavailableError, match="this cannot compile"):
        jit.build(the_plan, Cache(), since)
    assert time.monotonic() - began < 1


def test_library_that_does_not_load_is_a_failed_build(tiny: Path) -> None:
    write_tiny(tiny, kernel="int absent(); int tiny = absent();")
    expect_reference(new_loader(tiny), "the build failed: ImportError: .*undefined symbol.*absent")


def test_jit_can_be_switched_off_without_a_warning(
    tiny: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARGINOPS_DISABLE_JIT", "1")
    loader = new_loader(tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not loader.load("cpu")
    assert "MARGINOPS_DISABLE_JIT is set" in loader.outcome("cpu").reasons
    assert not cache_folder.exists()


def test_other_devices_have_no_kernels_and_no_warning(tiny: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not new_loader(tiny).load("mps")


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
        output, errors = forking.communicate(timeout=60)
    finally:
        forking.kill()
    assert output.strip() == "0", errors


def test_key_changes_with_everything_a_library_depends_on(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> str:
        return plan.make_plan("cpu", tiny).key

    keys = [key()]
    assert key() == keys[0]
    for file in ("module.cpp", "common/number.h", "cpu/tiny.cpp"):
        with (tiny / file).open("a") as source:
            source.write("// changed\n")
        keys.append(key())
    (tiny / "cpu/other.cpp").touch()
    keys.append(key())
    (tiny / "cpu/other.h").touch()
    keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "COMPILER_FLAGS", (*recipe.COMPILER_FLAGS, "-g"))
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "g++ -pipe")
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.12.0")
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr("platform.libc_ver", lambda: ("glibc", "2.17"))
        keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[5]


@pytest.mark.parametrize(
    ("capability", "name", "flags"),
    [
        ("AVX512", "_cpu_avx512", {"-march=x86-64-v4"}),
        ("AVX2", "_cpu_avx2", {"-march=x86-64-v3"}),
        ("DEFAULT", "_cpu_baseline", set()),
    ],
)
def test_instruction_set_follows_torch(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capability: str, name: str, flags: set[str]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    the_plan = plan.make_plan("cpu", tiny)
    assert the_plan.name == name
    assert {flag for flag in the_plan.compiler_flags if flag.startswith("-march")} == flags

    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert plan.make_plan("cpu", tiny).name == "_cpu_baseline"


def test_old_torch_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    expect_reference(new_loader(tiny), r"torch 2\.10\.1\+cpu is older than 2\.11")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"built for torch=2.999.0 archs=;", r"built for torch 2\.999\.0, running with torch"),
        (b"built for torch=2.9.1 archs=;", r"built for torch 2\.9\.1, running with torch"),
        (b"anything", "does not say what it was built for"),
        (b"built for torch=2.11.0 archs=;", "too short|invalid ELF|not a mach-o"),
    ],
)
def test_unfit_ahead_of_time_library_is_skipped(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str
) -> None:
    (tiny / "_cpu_baseline.so").write_bytes(content)
    monkeypatch.setenv("MARGINOPS_DISABLE_JIT", "1")
    expect_reference(new_loader(tiny), f"_cpu_baseline.so is skipped: .*({reason})")


def test_ahead_of_time_library_for_other_gpus_is_skipped(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny / "_cpu_baseline.so").write_bytes(b"built for torch=2.11.0 archs=8.0,8.9;")
    monkeypatch.setenv("MARGINOPS_DISABLE_JIT", "1")
    monkeypatch.setattr(toolchain, "visible_capabilities", lambda: [(8, 6), (9, 0)])
    expect_reference(new_loader(tiny), r"for GPU architecture 8\.0, 8\.9, running with 9\.0")


def test_import_builds_nothing(cache_folder: Path) -> None:
    process = python("import marginops, marginops.cli")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert not cache_folder.exists()


def test_op_without_a_compiler_gives_the_reference_and_one_warning() -> None:
    process = python(FIRST_OP, 0, CXX="/nonexistent")
    output, errors = process.communicate(timeout=60)
    assert output == "[1, 3, 0];[1, 3, 0];reference\n", errors
    assert errors.count("NativeUnavailableWarning") == 1
    assert "CXX=/nonexistent" in errors


@pytest.mark.slow
def test_sixteen_processes_build_once(cache_folder: Path) -> None:
    output, errors = python(FIRST_OP, 16).communicate(timeout=400)
    expected = ["[1, 3, 0];[1, 3, 0];built now"] + ["[1, 3, 0];[1, 3, 0];cached"] * 15
    assert sorted(output.splitlines()) == expected, errors
    assert errors.count("compiling the cpu kernels") == 1
    (library,) = cache_folder.rglob("*.so")
    assert obstacle(library) is None

    began = time.monotonic()
    output, errors = python(FIRST_OP, 0).communicate(timeout=60)
    assert (output, errors) == (f"{expected[-1]}\n", "")
    print(f"a process with the cache filled: {time.monotonic() - began:.1f} s")


def test_interrupted_build_is_tried_again(tiny: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "slow-g++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-c*) touch {tmp_path}/on; sleep 60;; esac\nc++ "$@"\n'
    )
    compiler.chmod(0o755)
    process = python(LOAD, tiny, CXX=str(compiler))
    deadline = time.monotonic() + 60
    while not (tmp_path / "on").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors
    assert not list(Cache().folder.glob("building-*"))
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
