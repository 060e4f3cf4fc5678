"""The machine code of the kernels: the instructions of their loops, from the disassembly.

PYTHONPATH=.:tests python -m helpers.sass [PATTERN]    # a table of all inner loops for sm_90
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.emulation import harness
from helpers.kernels import CUDA, FILES
from marginops._native import recipe

ARCH = "90"
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Loop:
    """The opcodes from the start of a loop to the branch back, with those of rare branches."""

    opcodes: Sequence[str]

    def loads(self, width: int) -> int:
        """The number of loads from global memory that read so many bytes for each thread."""
        return sum(load_bytes(opcode) == width for opcode in self.opcodes)

    @property
    def bytes_read(self) -> int:
        """The bytes that a thread reads from global memory in one iteration."""
        return sum(map(load_bytes, self.opcodes))


@dataclass(frozen=True)
class Kernel:
    """A kernel, by its C++ name without arguments."""

    name: str
    registers: int
    opcodes: Sequence[str]
    loops: Sequence[Loop]  # the innermost loops, in the order of the code


def load_bytes(opcode: str) -> int:
    """The bytes that an instruction loads from global memory; 0 for all others."""
    if not opcode.startswith("LDG"):
        return 0
    return next((WIDTHS[part] for part in opcode.split(".") if part in WIDTHS), 4)


def missing() -> str | None:
    """The reason why the kernels cannot be disassembled here, or ``None``."""
    toolkit = harness.toolkit()
    if toolkit is None or not (toolkit / "bin" / "nvcc").is_file():
        return "there is no nvcc (CUDA_HOME, /usr/local/cuda, PATH)"
    if disassembler() is None:
        return "there is no nvdisasm (PATH, or the package nvidia-cuda-nvdisasm)"
    return "there is no c++filt" if shutil.which("c++filt") is None else None


def disassembler() -> str | None:
    """The path of nvdisasm."""
    package = importlib.util.find_spec("nvidia")
    for folder in (package and package.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*/bin/nvdisasm")):
            return str(path)
    return shutil.which("nvdisasm")


def compiled(file: str, folder: Path) -> list[Kernel]:
    """The kernels of one of ``FILES``."""
    cubin = folder / f"{file}.cubin"
    nvcc = harness.toolkit() / "bin" / "nvcc"
    target = f"-gencode=arch=compute_{ARCH},code=sm_{ARCH}"
    command = [str(nvcc), *recipe.NVCC_FLAGS, f"-I{harness.SOURCES}", target, "-Xptxas", "-v"]
    report = run([*command, "-cubin", "-o", str(cubin), str(CUDA / file)]).stderr
    registers = dict(re.findall(r"entry function '(\w+)'[\s\S]*?Used (\d+) registers", report))
    code = run([str(disassembler()), "-c", str(cubin)]).stdout
    sections = re.split(r"^\.text\.(\w+):$", code, flags=re.MULTILINE)[1:]
    symbols = sections[::2]
    names = run(["c++filt", *symbols]).stdout.splitlines()
    kernels = []
    for symbol, name, text in zip(symbols, names, sections[1::2], strict=True):
        short = name.replace("marginops::cuda::", "").removeprefix("void ")
        short = re.sub(r"(?<=>)\(.*|(?<=_kernel)\(.*", "", short)
        instructions = list(parsed(text))
        opcodes = [opcode for _, opcode, _ in instructions]
        loops = [Loop(opcodes[begin:end]) for begin, end in inner_loops(instructions)]
        kernels.append(Kernel(short, int(registers[symbol]), opcodes, loops))
    return kernels


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True)


def parsed(text: str) -> Iterator[tuple[str, str, str]]:
    """The label, opcode and branch target of each instruction; a missing label is empty."""
    label = ""
    for line in text.splitlines():
        if found := re.match(r"(\.L_\w+):", line):
            label = found[1]
        elif found := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", line):
            to = re.search(r"`\((\.L_\w+)\)", found[2]) if found[1].startswith("BRA") else None
            yield label, found[1], to[1] if to else ""
            label = ""


def inner_loops(instructions: Sequence[tuple[str, str, str]]) -> list[tuple[int, int]]:
    """The begin and end of each innermost loop."""
    begins = {label: i for i, (label, _, _) in enumerate(instructions) if label}
    # A kernel ends with a branch to itself, which is no loop.
    loops = [
        (begins[to], end + 1)
        for end, (_, _, to) in enumerate(instructions)
        if to and begins[to] < end
    ]
    return [
        (begin, end)
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]


def main() -> None:
    pattern = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    reason = missing()
    if reason:
        sys.exit(reason)
    print("| kernel | registers | instructions | bytes read | instructions a byte |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for kernel in (k for file in FILES for k in compiled(file, Path(folder))):
            if not pattern.search(kernel.name):
                continue
            for loop in kernel.loops:
                if size := loop.bytes_read:
                    count = len(loop.opcodes)
                    figures = f"{kernel.registers} | {count} | {size} | {count / size:.1f}"
                    print(f"| `{kernel.name}` | {figures} |")


if __name__ == "__main__":
    main()
