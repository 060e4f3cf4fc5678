"""Builds with odd compilers, folders and processes: they succeed, or they give a reason."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from helpers.native_sources import expect_reference, new_loader, write_program, write_tiny
from helpers.processes import INSTALLED
from marginops._native import jit, ninja_file
from marginops._native.plan import make_plan

OUTPUT = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && output=$2; shift; done\n'
LOAD = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
PROGRAM
from marginops._native.loader import Loader
loader = Loader(Path(sys.argv[1]), Path(sys.argv[1]))
print(loader.load("cpu"), loader.outcome("cpu").reasons)
"""


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(folder))
    for variable in ("MARGINOPS_DISABLE_JIT", "MARGINOPS_VERBOSE", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(variable, raising=False)
    return folder


def load_in_a_process(
    sources: Path, program: str = "", folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Loads the library of the sources in another process, in which the program ran before."""
    return subprocess.run(
        [sys.executable, "-c", LOAD.replace("PROGRAM", program), str(sources)],
        env=os.environ | {"PYTHONPATH": INSTALLED} | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def write_compiler(path: Path, body: str, version: str = "exec c++ --version") -> str:
    return write_program(path, f'case "$*" in *--version*) {version}; exit;; esac\n{body}')


@pytest.mark.parametrize(
    "command",
    ["c++ -DX='a b' -fno-plt", "env X=1 c++", "PROGRAM", "PROGRAM '-DX=$(x) \"'"],
)
def test_command_builds(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    noise = "head -c 3000000 /dev/zero | tr '\\0' x >&2"
    program = write_compiler(tmp_path / "chatty", f'{noise}\nexec c++ "$@"', "echo caf\\351")
    monkeypatch.setenv("CXX", command.replace("PROGRAM", program))
    loader = new_loader(tiny)
    assert loader.load("cpu")
    assert loader.outcome("cpu").implementation == "built now"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("exit 0", "reports no error, but makes no library"),
        (OUTPUT + ": >$output", "reports no error, but makes no library"),
        (OUTPUT + "head -c 5000 /dev/urandom >$output", "reports no error, but makes no library"),
        ("exit 1", "the compiler fails without a word"),
        ("kill -9 $$", "Killed"),
        ('echo "Übersetzung: Fehler: nichts da"; exit 1', "Übersetzung: Fehler: nichts da"),
        ("echo note; echo 'x.cpp:1: error: wrong' >&2; exit 1", "build failed: x.cpp:1: error: wr"),
        ("printf '\\001\\377\\033[31mx'; exit 1", r"build failed: \?.x \(full"),
        (
            "echo 'ld: no space' >&2; echo 'collect2: error: ld returned 1 exit status'; exit 1",
            "ld: no",
        ),
        ("head -c 9000000 /dev/zero | tr '\\0' x; exit 1", r"x{300} \.\.\. \(full output"),
    ],
)
def test_compiler_that_fails_is_the_reason(
    tiny: Path,
    cache_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    reason: str,
) -> None:
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "g++", body))
    expect_reference(new_loader(tiny), reason)
    assert list(cache_folder.glob("*/*.log"))
    assert not list(cache_folder.glob("*/building-*"))


def test_truncated_library_is_not_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f'c++ "$@" || exit\n{OUTPUT}case $output in *.so) truncate -s 5000 $output;; esac'
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "g++", body))
    expect_reference(new_loader(tiny), "reports no error, but makes no library")


def test_compiler_that_hangs_is_ended(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "IDLE_LIMIT", 2.0)
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "g++", "sleep 600"))
    began = time.monotonic()
    expect_reference(new_loader(tiny), "the build failed: .* wrote nothing for 2 s")
    assert time.monotonic() - began < 60


def test_old_compiler_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "echo 'x.cpp:1: error: no such feature' >&2; exit 1"
    version = "echo 'g++ (Debian 8.3.0-6) 8.3.0'"
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "g++", body, version))
    expect_reference(new_loader(tiny), r"GCC 8\.3, but marginops needs GCC 11 .*no such feature")


def test_compiler_without_the_instruction_set_builds_the_baseline(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    refusal = "echo \"cc1plus: error: bad value ('x86-64-v3') for '-march=' switch\" >&2; exit 1"
    body = f'case "$*" in *-march=x86-64-v*) {refusal};; esac\nexec c++ "$@"'
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "g++", body))
    write_tiny(tiny, kernel="#ifdef __AVX2__\n#error not the baseline\n#endif")
    assert new_loader(tiny).load("cpu")
    assert "g++ does not know avx2, so it compiles for any processor" in capfd.readouterr().err
    again = new_loader(tiny)
    assert again.load("cpu")
    assert again.outcome("cpu").implementation == "cached"


@pytest.mark.parametrize(
    "name",
    [
        b"with space",
        "ünï-ジ".encode(),
        b"dollar$HOME",
        b"colon:x|y",
        b"quote'\"x",
        b"new\nline",
        b"semi;x&y",
        b"percent%s{}",
        b"back\\slash",
        b"-dash",
        b"#hash",
    ],
)
def test_folders_may_have_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(folder / "cache"))
    loader = new_loader(write_tiny(folder / "csrc"))
    loader.load("cpu")
    assert loader.outcome("cpu").implementation == "built now", loader.outcome("cpu").reasons


def test_a_folder_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    """In a process of its own: other packages cannot read such names of loaded libraries."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/non-utf8-\xff")
    write_tiny(Path(folder) / "csrc")
    done = load_in_a_process(Path(folder) / "csrc", MARGINOPS_CACHE_DIR=f"{folder}/cache")
    assert done.stdout.startswith("True "), done.stdout + done.stderr


def test_library_names_no_folder_of_this_machine(tiny: Path) -> None:
    """Libraries are shared between installations, whose errors must not name each other."""
    write_tiny(tiny, kernel="const char* tiny() { return __FILE__; }")
    loader = new_loader(tiny)
    assert loader.load("cpu")
    library = loader.outcome("cpu").library
    assert library is not None
    content = library.read_bytes()
    assert b"csrc/cpu/tiny.cpp" in content
    assert str(tiny).encode() not in content


@pytest.mark.parametrize(
    ("text", "jobs"), [("", 3), ("0", 5), ("1", 1), (" 2 ", 2), ("99999999999999999999", 5)]
)
def test_number_of_jobs(monkeypatch: pytest.MonkeyPatch, text: str, jobs: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setenv("MAX_JOBS", text)
    assert jit._jobs(5) == jobs


@pytest.mark.parametrize("text", ["abc", "-1", "1.5", "٣"])
def test_wrong_number_of_jobs_is_the_reason(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("MAX_JOBS", text)
    expect_reference(new_loader(tiny), f"MAX_JOBS: expected a number such as 4, got {text}")


@pytest.mark.parametrize(
    "program",
    [
        "import torch; sys.executable = None",
        "sys.executable = ''",
        "sys.executable, sys.frozen = '/bin/false', True",
        "sys.path.insert(0, Path.cwd())",
        "import types; sys.modules['ninja'] = types.ModuleType('ninja')",
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        "sys.stdout.flush(); sys.stderr = None",
        "import os; os.close(0)",
        "import os, torch.utils.cpp_extension; os.mkdir('x'); os.chdir('x'); os.rmdir('../x')",
        "import os; os.environ['LD_PRELOAD'] = '/nonexistent.so'",
    ],
)
def test_any_process_can_build(tiny: Path, tmp_path: Path, program: str) -> None:
    done = load_in_a_process(tiny, program, folder=tmp_path)
    assert done.stdout.startswith("True "), done.stdout + done.stderr


def test_reason_in_a_process_that_cannot_wait_for_children(tiny: Path, tmp_path: Path) -> None:
    compiler = write_compiler(tmp_path / "g++", "echo 'x.cpp:1: error: wrong'; exit 1")
    program = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    done = load_in_a_process(tiny, program, CXX=compiler)
    assert "the build failed: x.cpp:1: error: wrong" in done.stdout, done.stderr


def test_missing_headers_of_python(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = sysconfig.get_path("include", "posix_prefix")
    monkeypatch.setattr(sysconfig, "get_path", lambda *names: str(tmp_path / "none"))
    expect_reference(new_loader(tiny), r"Python\.h is missing in .*none: .*python3-dev")
    monkeypatch.setenv("CPATH", f"/nonexistent:{headers}")
    assert new_loader(tiny).load("cpu")


def test_missing_headers_of_torch(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.include_paths", lambda: [str(tmp_path)])
    expect_reference(new_loader(tiny), r"torch/csrc/stable/tensor\.h is missing in .*torch has no")


def test_missing_setuptools_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension", raising=False)
    monkeypatch.delattr("torch.utils.cpp_extension", raising=False)
    monkeypatch.setitem(sys.modules, "setuptools", None)
    expect_reference(new_loader(tiny), "setuptools is missing: run pip install setuptools")


def test_commands_for_cuda(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "cuda $home"
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib/libcudart.so.99"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    (home / "include/cuda_runtime_api.h").write_text("#define CUDART_VERSION 99000\n")
    (tiny / "cuda").mkdir()
    (tiny / "cuda/tiny.cu").touch()
    compiler = write_compiler(tmp_path / "my-g++", "exit 1")
    for name, value in {
        "CXX": f"{compiler} -fno-plt",
        "CUDA_HOME": str(home),
        "MARGINOPS_CUDA_ARCH_LIST": "9.0+PTX",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("CC", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.version.cuda", "99.1")
    folder = tmp_path / "build"
    folder.mkdir()
    ninja_file.write(make_plan("cuda", tiny), folder)
    text = (folder / "build.ninja").read_text()
    (nvcc,) = (line for line in text.splitlines() if "bin/nvcc" in line)
    assert nvcc.startswith(f"  command = '{tmp_path}/cuda $$home/bin/nvcc' -Icsrc ")
    assert f" -ccbin {compiler} " in nvcc
    assert " -gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_90,code=compute_90 " in nvcc
    assert " --compiler-options -fPIC -c $in -o $out" in nvcc
    (link,) = (line for line in text.splitlines() if " -shared " in line)
    assert " -lc10_cuda " in link
    assert " -ltorch_cuda " in link
    assert link.endswith(" -Lcuda-libraries -l:libcudart.so.99 -o $out")
    assert "build cuda-tiny.cu.o: compile_cuda csrc/cuda/tiny.cu" in text
    assert (folder / "cuda").resolve() == (home / "include").resolve()
