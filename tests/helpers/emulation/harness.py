"""Builds libraries that run CUDA kernels on the CPU, and starts processes that load them."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

from marginops._native import recipe

HERE = Path(__file__).resolve().parents[2] / "emulation"
SOURCES = HERE.parents[1] / "csrc"
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
TOOLS = {
    "plain": ("-O2",),
    "asan": ("-O1", "-g1", f"-fsanitize=address,{UNDEFINED}", "-fno-sanitize-recover"),
    "tsan": ("-O1", "-g1", "-fsanitize=thread"),
}
RUNTIMES = {"asan": "libasan.so", "tsan": "libtsan.so"}
OPTIONS = {
    # ASan fills new memory with 0xbe bytes, so a workspace does not begin with zeros.
    "ASAN_OPTIONS": f"detect_leaks=0:max_malloc_fill_size={1 << 30}",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
FLAGS = (
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",
    "-pthread",
)


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit, known by its headers; ``None`` if there is none."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parents[1]))
    for candidate in candidates:
        if candidate and (Path(candidate) / "include" / "cuda_runtime_api.h").is_file():
            return Path(candidate)
    return None


def missing() -> str | None:
    """Why kernels cannot run here, or ``None`` if they can."""
    if platform.machine() != "x86_64":
        return f"the fibers are written for x86_64, this is {platform.machine()}"
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler {compiler()}"
    if toolkit() is None:
        return "there are no CUDA headers (CUDA_HOME, /usr/local/cuda, beside nvcc)"
    return None


def compiler() -> str:
    """The host compiler."""
    return os.environ.get("CXX", "g++")


def build_selftest(tool: str) -> Path:
    """The library of ``selftest.cpp``, built for one of ``TOOLS``."""
    return _build(f"selftest-{tool}", tool, [HERE / "selftest.cpp"])


def build_library(tool: str) -> Path:
    """The CUDA library, built for CPU tensors and one of ``TOOLS``.

    ``torch.ops.load_library`` loads it in a process started by :func:`run_python`.
    """
    compiling = [recipe.STABLE_ABI, "-fvisibility=hidden", "-fno-extern-tls-init"]
    for folder in cpp_extension.include_paths():
        compiling += ["-isystem", folder]
    linking = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    linking += ["-ltorch", "-ltorch_cpu", "-lc10"]
    sources = recipe.sources(SOURCES, "cuda")[1:]  # the first makes a Python module of it
    return _build(f"library-{tool}", tool, sources, compiling, linking)


def _build(
    name: str,
    tool: str,
    sources: Sequence[Path],
    compiling: Sequence[str] = (),
    linking: Sequence[str] = (),
) -> Path:
    """A shared library, built once for each state of the sources."""
    command = [compiler(), *TOOLS[tool], "-shared", "-fPIC", "-pthread"]
    # -Bsymbolic: calls of the functions that binding.h replaces stay in the library.
    link = [*command, "-Wl,-Bsymbolic"]
    command += [*FLAGS, f"-I{HERE / 'include'}", f"-I{SOURCES}"]
    command += ["-isystem", f"{toolkit()}/include", *compiling]
    bound = ["-include", str(HERE / "binding.h")]

    def compiled(source: Path, folder: Path) -> str:
        target = str(folder / f"{source.name}.o")
        options = bound if source.name.endswith("_ops.cpp") else []
        _run([*command, *options, "-x", "c++", "-c", str(source), "-o", target])
        return target

    digest = hashlib.sha256(repr([command, bound, link, linking, sources]).encode())
    for folder in (HERE, SOURCES):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"marginops-emulation-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    finished = cache / f"{name}-{digest.hexdigest()[:16]}.so"
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            for other in cache.glob(f"{name}-*.so"):  # younger ones may be in use
                if time.time() - other.stat().st_mtime > 24 * 3600:
                    other.unlink()
            with tempfile.TemporaryDirectory(dir=cache) as temporary, ThreadPoolExecutor(2) as pool:
                target = Path(temporary, "library.so")
                objects = pool.map(lambda source: compiled(source, target.parent), sources)
                _run([*link, *objects, *linking, "-o", str(target)])
                target.replace(finished)
    return finished


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-8000:]}")


def run_selftest(
    tool: str, names: Sequence[str], order: str = "forward"
) -> subprocess.CompletedProcess[str]:
    """Run kernels of ``selftest.cpp``."""
    script = (
        "import ctypes, sys; words = [word.encode() for word in sys.argv[1:]];"
        "count = len(words); words = (ctypes.c_char_p * count)(*words);"
        "sys.exit(ctypes.CDLL(words[0].decode()).selftest(count, words))"
    )
    arguments = ["-c", script, str(build_selftest(tool)), *names]
    return run_python(tool, arguments, CUDACPU_ORDER=order)


def run_library(
    tool: str, arguments: Sequence[str], multiprocessors: int = 132
) -> subprocess.CompletedProcess[str]:
    """Run Python with the CUDA library in place of the CPU's kernels.

    Launchers share out work by the number of multiprocessors: few of them make small inputs take
    the ways of large ones.
    """
    return run_python(
        tool,
        arguments,
        MARGINOPS_TEST_LIBRARY=str(build_library(tool)),
        CUDACPU_MULTIPROCESSORS=str(multiprocessors),
    )


def run_python(
    tool: str, arguments: Sequence[str], **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in an environment in which it can load what is built for one of ``TOOLS``."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment(tool), **variables},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def environment(tool: str) -> dict[str, str]:
    """What a Python process that loads a library for this tool needs in its environment."""
    variables = {
        **OPTIONS,
        "CUDACPU_WORKERS": "2",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONUNBUFFERED": "1",  # a sanitizer ends the process at once
    }
    if tool in RUNTIMES:
        # Python is not linked with the sanitizer, which must come first. The sanitizer takes the
        # place of functions of the C++ library only if that is there when the process starts.
        names = (RUNTIMES[tool], "libstdc++.so")
        variables["LD_PRELOAD"] = " ".join(map(_library_of_compiler, names))
    return variables


def _library_of_compiler(name: str) -> str:
    command = [compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
