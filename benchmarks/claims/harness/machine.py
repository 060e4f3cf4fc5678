"""The processor on which a claim was measured."""

import re
from pathlib import Path

import torch


def processor() -> str:
    """Its name and its instruction set."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return f"{[*names, 'unknown'][0]}, {torch.backends.cpu.get_cpu_capability()}"
