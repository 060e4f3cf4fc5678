"""Builds what runs CUDA kernels on the CPU, and starts processes in which they run."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
    """The program of ``selftest.cpp``, built for one of ``TOOLS``."""
    command = [*_compile(tool), str(HERE / "selftest.cpp")]

    def build(folder: Path) -> Path:
        return _run([*command, "-o", str(folder / "selftest")], folder / "selftest")

    return _cached(f"selftest-{tool}", command, build)


def build_library(tool: str) -> Path:
    """The CUDA library, built for CPU tensors and one of ``TOOLS``.

    ``torch.ops.load_library`` loads it. Under a sanitizer this needs the environment of
    :func:`environment`.
    """
    sources = recipe.sources(SOURCES, "cuda")[1:]  # the first makes a Python module of it
    # -Bsymbolic: the library's calls of functions that binding.h replaces stay inside.
    link = [compiler(), *TOOLS[tool], "-shared", "-pthread", "-Wl,-Bsymbolic"]
    link += [f"-L{folder}" for folder in cpp_extension.library_paths()]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    command = [*_compile(tool), "-c", "-fPIC", "-fno-extern-tls-init"]
    command += [recipe.STABLE_ABI, "-fvisibility=hidden"]
    for folder in cpp_extension.include_paths():
        command += ["-isystem", folder]
    bound = ["-include", str(HERE / "binding.h")]

    def build(folder: Path) -> Path:
        def compiled(source: Path) -> str:
            target = folder / f"{source.name}.o"
            language = ["-x", "c++", *(bound if source.suffix == ".cpp" else [])]
            return str(_run([*command, *language, str(source), "-o", str(target)], target))

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, sources))
        target = folder / "library.so"
        return _run([*link, *objects, *libraries, "-o", str(target)], target)

    return _cached(f"library-{tool}", [*command, *bound, *link, *map(str, sources)], build)


def _compile(tool: str) -> list[str]:
    headers = [f"-I{HERE / 'include'}", f"-I{SOURCES}", "-isystem", f"{toolkit()}/include"]
    return [compiler(), *FLAGS, *TOOLS[tool], *headers]


def _run(command: Sequence[str], target: Path) -> Path:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-8000:]}")
    return target


def _cached(name: str, key: Sequence[str], build: Callable[[Path], Path]) -> Path:
    """What ``build(folder)`` makes, made once for each key and state of the sources."""
    digest = hashlib.sha256(repr(key).encode())
    for folder in (HERE, SOURCES):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"marginops-emulation-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    finished = cache / f"{name}-{digest.hexdigest()[:16]}"
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            for other in cache.glob(f"{name}-*"):  # younger ones may be in use
                if time.time() - other.stat().st_mtime > 24 * 3600:
                    other.unlink()
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                build(Path(folder)).replace(finished)
    return finished


def run_selftest(
    tool: str, names: Sequence[str], order: str = "forward"
) -> subprocess.CompletedProcess[str]:
    """Run kernels of ``selftest.cpp``."""
    command = [str(build_selftest(tool)), *names]
    environment = {**os.environ, **OPTIONS, **_settings(order, 132)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def run_python(
    tool: str,
    arguments: Sequence[str],
    order: str = "forward",
    multiprocessors: int = 132,
    timeout: float = 1200,
) -> subprocess.CompletedProcess[str]:
    """Run Python with ``build_library(tool)`` in place of the CPU's kernels."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command,
        env={**os.environ, **environment(tool, order, multiprocessors)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def environment(tool: str, order: str = "forward", multiprocessors: int = 132) -> dict[str, str]:
    """What a Python process needs in its environment to run the emulated kernels."""
    variables = {
        **OPTIONS,
        **_settings(order, multiprocessors),
        "MARGINOPS_TEST_LIBRARY": str(build_library(tool)),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    if tool in RUNTIMES:
        # Python itself is not linked with the sanitizer, which must come first; it finds the
        # functions that it replaces only in libraries that are there when it starts.
        names = (RUNTIMES[tool], "libstdc++.so")
        variables["LD_PRELOAD"] = " ".join(map(_library_of_compiler, names))
    return variables


def _settings(order: str, multiprocessors: int) -> dict[str, str]:
    """Two OS threads run blocks, in the given order, of which launchers make few or many."""
    return {
        "CUDACPU_ORDER": order,
        "CUDACPU_WORKERS": "2",
        "CUDACPU_MULTIPROCESSORS": str(multiprocessors),
    }


def _library_of_compiler(name: str) -> str:
    command = [compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
