"""Selects and scores samples of a head with 32,000 classes, without its logits.

The ``linear_*`` ops take the features and the last layer. They compute a tile of logits at a time
and read it at once, so the logits of all samples never exist together.

    python examples/large_head.py

takes a few seconds on one CPU, and compares the results with those of the logits themselves.
"""

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, linear

import marginops

SAMPLES, FEATURES, CLASSES, CHOSEN = 1024, 256, 32000, 64


def peak_memory() -> float:
    """The most memory that this process has had so far, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    torch.manual_seed(0)
    # In float64 no rounding changes the order of two scores, so the indices can be compared.
    features = torch.randn(SAMPLES, FEATURES, dtype=torch.float64)
    weight = torch.randn(CLASSES, FEATURES, dtype=torch.float64)
    target = torch.randint(CLASSES, (SAMPLES,))

    before = peak_memory()
    chosen = marginops.linear_select_minimal_margin(features, weight, k=CHOSEN).indices
    loss = marginops.linear_sample_statistics(features, weight, target).loss
    print(f"The fused ops need {peak_memory() - before:.0f} MiB.")

    before = peak_memory()
    logits = linear(features, weight)
    values, classes = logits.topk(2, dim=1)
    distance = (weight[classes[:, 0]] - weight[classes[:, 1]]).norm(dim=1)
    scores = (values[:, 0] - values[:, 1]) / distance
    eager_chosen = scores.topk(CHOSEN, largest=False).indices
    eager_loss = cross_entropy(logits, target, reduction="none")
    print(f"The eager lines with logits need {peak_memory() - before:.0f} MiB more.")

    same = int((chosen == eager_chosen).sum())
    difference = (loss - eager_loss).abs().max().item()
    print(f"{same} of the {CHOSEN} chosen samples are the same, in the same order.")
    print(f"The losses differ by {difference:.0e} at most.")


if __name__ == "__main__":
    main()
