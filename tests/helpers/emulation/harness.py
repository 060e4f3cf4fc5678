"""Builds programs that run CUDA kernels on the CPU, and runs cases of tensors through them."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils import cpp_extension

from marginops._native import recipe

HERE = Path(__file__).resolve().parents[2] / "emulation"
SOURCES = HERE.parents[1] / "csrc"
BOUND = tuple(path.name for path in (SOURCES / "cuda").glob("*.cpp"))
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
TOOLS = {
    "plain": ("-O2",),
    "asan": ("-O1", "-g", f"-fsanitize=address,{UNDEFINED}", "-fno-sanitize-recover"),
    "tsan": ("-O1", "-g", "-fsanitize=thread"),
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
DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.bool: "bool",
}


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


def build_binding() -> Path:
    """The CUDA library for CPU tensors: a library to load with ``torch.ops.load_library``."""
    # The stable ABI's target is that of the packaged build; -Bsymbolic is for the stubs.
    flags = ["-shared", "-fPIC", "-fno-extern-tls-init", "-Wl,-Bsymbolic", recipe.STABLE_ABI]
    flags.append("-fvisibility=hidden")  # as torch::stable is
    for folder in cpp_extension.include_paths():
        flags += ["-isystem", folder]
    flags += [f"-L{folder}" for folder in cpp_extension.library_paths()]
    return build("binding", "plain", [*flags, "-ltorch", "-ltorch_cpu", "-lc10"])


def build(name: str, tool: str, flags: Sequence[str] = ()) -> Path:
    """Compile ``<name>.cpp`` for one of ``TOOLS``, once for each state of the sources."""
    command = [compiler(), *FLAGS, *TOOLS[tool], f"-I{HERE / 'include'}", f"-I{SOURCES}"]
    command += ["-isystem", f"{toolkit()}/include", str(HERE / f"{name}.cpp"), *flags]
    digest = hashlib.sha256(repr(command).encode())
    for folder in (HERE, SOURCES):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cu", ".cuh") or path.name in (f"{name}.cpp", *BOUND):
                digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"marginops-cudacpu-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    program = cache / f"{name}-{tool}-{digest.hexdigest()[:16]}"
    with open(cache / f"{name}-{tool}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            for other in cache.glob(f"{name}-{tool}-*"):  # younger ones may be in use
                if time.time() - other.stat().st_mtime > 24 * 3600:
                    other.unlink()
            unfinished = cache / f"{name}-{tool}.new"
            result = subprocess.run(
                [*command, "-o", str(unfinished)], capture_output=True, text=True
            )
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-8000:]}")
            unfinished.replace(program)
    return program


def execute(
    program: Path,
    arguments: Sequence[str],
    order: str = "forward",
    multiprocessors: int = 132,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a program with threads and blocks in the given order; two OS threads run blocks.

    Launchers share out work by the number of multiprocessors: few of them make small inputs take
    the ways of large ones.
    """
    environment = {
        **os.environ,
        "CUDACPU_ORDER": order,
        "CUDACPU_WORKERS": "2",
        "CUDACPU_MULTIPROCESSORS": str(multiprocessors),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "exitcode=66 halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [str(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@dataclass
class Case:
    """One call of a launcher: its numbers, its input tensors and the outputs it fills."""

    op: str
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    inputs: Mapping[str, Tensor | None] = field(default_factory=dict)
    outputs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)


class LaunchError(RuntimeError):
    """A launcher returned an error."""


def run_cases(
    program: Path,
    cases: Iterable[Case],
    order: str = "forward",
    multiprocessors: int = 132,
    timeout: float = 300,
) -> list[dict[str, Tensor]]:
    """The outputs of every case, all run by one process.

    Raises:
        LaunchError: A launcher returned an error; its message says which case and why.
        RuntimeError: A sanitizer reported something, or the program ended early.
    """
    cases = list(cases)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_cases(cases, Path(folder))
        arguments = [str(path) for path in paths]
        result = execute(program, arguments, order, multiprocessors, timeout)
        if result.returncode:
            last = "case " + result.stderr.rpartition("\ncase ")[2].removeprefix("case ")
            kind = LaunchError if result.returncode == 3 else RuntimeError
            raise kind(f"exit status {result.returncode}: {last[:6000]}")
        return _read(cases, paths[2].read_bytes())


def write_cases(cases: Iterable[Case], folder: Path) -> list[Path]:
    """Write the arguments of the driver into a folder: cases, data, and the place for results."""
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in ("cases", "data", "results")]
    lines: list[str] = []
    data: list[bytes] = []
    for case in cases:
        lines += _describe(case, data)
    paths[0].write_text("\n".join(lines) + "\n")
    paths[1].write_bytes(b"".join(data))
    return paths


def _describe(case: Case, data: list[bytes]) -> list[str]:
    lines = [f"case {case.op}"]
    for name, number in case.numbers.items():
        lines.append(
            f"real {name} {number.hex()}" if isinstance(number, float) else f"int {name} {number}"
        )
    for name, tensor in case.inputs.items():
        if tensor is None:
            continue
        reach = sum(
            (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        elements = tensor.storage_offset() + reach + 1 if tensor.numel() else 0
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())[:elements]
        data.append(whole.view(torch.uint8).numpy().tobytes())
        sizes = " ".join(str(n) for n in (*tensor.shape, *tensor.stride()))
        offset = tensor.storage_offset() if elements else 0
        lines.append(
            f"input {name} {DTYPES[tensor.dtype]} {elements * tensor.element_size()} {offset} "
            f"{tensor.dim()} {sizes}"
        )
    for name, (dtype, shape) in case.outputs.items():
        bytes_ = int(np.prod(shape)) * dtype.itemsize
        lines.append(f"output {name} {DTYPES[dtype]} {bytes_}")
    return [*lines, "run"]


def _read(cases: Sequence[Case], results: bytes) -> list[dict[str, Tensor]]:
    position, every = 0, []
    for case in cases:
        outputs = {}
        for name, (dtype, shape) in case.outputs.items():
            size = int(np.prod(shape)) * dtype.itemsize
            part = bytearray(results[position : position + size])
            position += size
            empty = torch.empty(shape, dtype=dtype)
            outputs[name] = torch.frombuffer(part, dtype=dtype).reshape(shape) if part else empty
        every.append(outputs)
    if position != len(results):
        raise RuntimeError(f"expected {position} bytes of results, got {len(results)}")
    return every
