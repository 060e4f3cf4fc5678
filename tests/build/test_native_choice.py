"""The choice of a library: keys, instruction sets, libraries built ahead of time, environment."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from helpers.native_sources import expect_reference, new_loader
from marginops._native import architectures, plan, recipe
from marginops._native.loader import _obstacle as obstacle


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(folder))
    for variable in ("MARGINOPS_DISABLE_JIT", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    return folder


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


def test_old_torch_is_the_reason(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    expect_reference(new_loader(tiny), r"torch 2\.10\.1\+cpu is older than 2\.11")


def write_ahead_of_time(csrc: Path, content: str) -> None:
    content = content.replace("SOURCES", recipe.fingerprint(csrc, "cpu"))
    (csrc / "_cpu_baseline.so").write_text(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "built for torch=2.999.0 sources=SOURCES archs=;",
            r"built for torch 2\.999\.0, running with torch",
        ),
        (
            "built for torch=2.9.1 sources=SOURCES archs=;",
            r"built for torch 2\.9\.1, running with torch",
        ),
        ("anything", "does not say what it was built for"),
        ("built for torch=2.11.0 sources=SOURCES archs=;", "too short|invalid ELF|not a mach-o"),
    ],
)
def test_unusable_ahead_of_time_library_is_skipped(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, content: str, reason: str
) -> None:
    write_ahead_of_time(tiny, content)
    monkeypatch.setenv("MARGINOPS_DISABLE_JIT", "1")
    expect_reference(new_loader(tiny), f"_cpu_baseline.so is skipped: .*({reason})")


def test_ahead_of_time_library_for_other_gpus_is_skipped(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ahead_of_time(tiny, "built for torch=2.11.0 sources=SOURCES archs=8.0,8.9;")
    monkeypatch.setenv("MARGINOPS_DISABLE_JIT", "1")
    monkeypatch.setattr(architectures, "visible_capabilities", lambda: [(8, 6), (9, 0)])
    expect_reference(new_loader(tiny), r"for GPU architecture 8\.0, 8\.9, running with 9\.0")


@pytest.mark.parametrize("file", ["module.cpp", "common/number.h", "cpu/tiny.cpp", "cpu/new.h"])
def test_ahead_of_time_library_of_other_sources_is_skipped(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    write_ahead_of_time(tiny, "built for torch=2.11.0 sources=SOURCES archs=;")
    library = tiny / "_cpu_baseline.so"
    assert obstacle(library, "cpu", tiny) is None
    with (tiny / file).open("a") as source:
        source.write("// changed\n")
    monkeypatch.setenv("MARGINOPS_DISABLE_JIT", "1")
    expect_reference(new_loader(tiny), f"{library.name} is skipped: built from other sources than")


def test_missing_compiler(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    expect_reference(
        new_loader(tiny), "CXX: expected .* C.. compiler, got /nonexistent/g.. .*does not exist"
    )
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    expect_reference(new_loader(tiny), "no C.. compiler: install g.. or")


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
