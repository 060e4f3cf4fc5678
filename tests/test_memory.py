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
    "select_smallest": "marginops.select_smallest(logits[:n, 0], n // 10)",
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
    # O(N): 4 bytes a score, 4 a copied score or table entry, 8 a candidate, and for a tenth of the
    # rows 8 to sort, 12 of results. The rest: 1 MiB, and what the heap and threads keep.
    per_row = 4 if call in ("minimal_margin_score", "nearest", "classification_margin") else 18
    table = 4 * rows if classes == 20 else 0
    assert int(run.stdout) <= (1 << 20) + per_row * rows + table + (3 << 20)
