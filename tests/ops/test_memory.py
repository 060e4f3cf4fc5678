"""Peak extra memory: outputs, O(N) scratch, 1 MiB, and for a linear head a chunk of logits."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch, marginops
torch.set_num_threads(2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
logits = torch.randn({rows}, {classes})
weight = torch.randn({classes}, 64)
target = torch.zeros({rows}, dtype=torch.int64)
call = lambda n: {call}
call(100)
before = peak()
result = call({rows})
print(peak() - before)
"""

CALLS = {
    "minimal_margin_score": "marginops.minimal_margin_score(logits[:n], weight)",
    "nearest": "marginops.minimal_margin_score(logits[:n], weight, rival='nearest')",
    "logits": "marginops.minimal_margin_score(logits[:n])",
    "probabilities": "marginops.minimal_margin_score(logits[:n], softmax=True)",
    "classification_margin": "marginops.classification_margin(logits[:n], target[:n])",
    "select_smallest": "marginops.select_smallest(logits[:n, 0], n // 10)",
    "select_minimal_margin": "marginops.select_minimal_margin(logits[:n], weight, k=n // 10)",
    "select_classification_margin": (
        "marginops.select_classification_margin(logits[:n], target[:n], n // 10)"
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("rows", "classes"), [(4000, 20000), (1_000_000, 20)])
def test_peak_extra_memory(call, rows, classes):
    program = PROGRAM.format(rows=rows, classes=classes, call=CALLS[call])
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    # O(N): 4 bytes for each score, 4 for each copied score or table entry, 8 for each candidate.
    # A tenth of the rows take 8 more to be sorted and 12 as results. Besides that there are 1 MiB
    # of scratch and what the heap and the threads keep.
    per_row = 18 if call.startswith("select") else 4
    table = 4 * rows if classes == 20 else 0
    assert int(run.stdout) <= (1 << 20) + per_row * rows + table + (3 << 20)


LINEAR_PROGRAM = """
import torch, marginops
torch.set_num_threads(2)
input = torch.randn({rows}, 16, requires_grad=True)
weight = torch.randn({classes}, 16, requires_grad=True)
bias = torch.randn({classes}, requires_grad=True)
target = torch.randint({classes}, ({rows},))

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

def backward(rows):
    torch.autograd.grad(call(rows).sum(), (input, weight, bias))

def call(n):
    return {call}

for run in (call, backward):
    run(1100)  # enough rows for several tiles
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the peak to the memory in use now
    before = status("VmRSS")
    run({rows})
    print(status("VmHWM") - before)
"""

LINEAR_CALLS = {
    "classification_margin": "(input[:n], weight, target[:n], bias, {size})",
    "minimal_margin_score": "(input[:n], weight, bias, rival='nearest', {size})",
    "sample_statistics": "(input[:n], weight, target[:n], bias, {size}).loss",
    "select_minimal_margin": "(input[:n], weight, bias, k=n // 2, {size}).scores",
    "select_classification_margin": (
        "(input[:n], weight, target[:n], bias, k=n // 2, {size}).scores"
    ),
}


@pytest.mark.parametrize(
    ("call", "mebibytes"), [(call, None) for call in LINEAR_CALLS] + [("sample_statistics", 8)]
)
def test_peak_extra_memory_without_logits(call, mebibytes):
    rows, classes = 20000, 6000
    size = None if mebibytes is None else mebibytes << 20
    arguments = LINEAR_CALLS[call].format(size=f"chunk_bytes={size}")
    program = LINEAR_PROGRAM.format(
        rows=rows, classes=classes, call=f"marginops.linear_{call}{arguments}"
    )
    # Freed large blocks go back to the system at once, so the measurement shows memory in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    # Forward: for each sample 40 bytes of sums, twice, and the statistics that follow.
    # Backward: for two classes of each sample a row of 16 floats, its scaled copy, and keys to
    # sort; the gradients themselves. If the logits are computed again, their gradient overwrites
    # them.
    assert 4 * rows * classes > 400 << 20
    forward, backward = map(int, run.stdout.split())
    assert forward <= (size or 16 << 20) + (4 << 20) + 150 * rows
    assert backward <= (size or 16 << 20) + (10 << 20)
