"""Peak extra memory of the ops: their outputs, at most 1 MiB, and O(N) scratch."""

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
    "classification_margin": "marginops.classification_margin(logits[:n], target[:n])",
    "select_minimal_margin": "marginops.select_minimal_margin(logits[:n], weight, n // 10)",
    "select_smallest_margin": "marginops.select_smallest_margin(logits[:n], target[:n], n // 10)",
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("rows", "classes"), [(4000, 20000), (1_000_000, 20)])
def test_peak_extra_memory(call, rows, classes):
    program = PROGRAM.format(rows=rows, classes=classes, call=CALLS[call])
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    # 4 bytes a score, 4 a table entry or radius, 16 a candidate and a chosen; the heap's slack.
    assert int(run.stdout) <= (1 << 20) + 40 * rows + (2 << 20)
