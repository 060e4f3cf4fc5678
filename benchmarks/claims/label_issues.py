"""Measure how well ``label_issues`` finds labels that were changed, beside cleanlab.

python benchmarks/claims/label_issues.py          # a table and a result file
python benchmarks/claims/label_issues.py --quick  # one seed, fewer epochs; writes nothing

Each label of Fashion-MNIST is changed with a probability to one of the other classes. A network
784-256-10 is trained once on these labels, and ``label_issues`` orders the samples. cleanlab gets
the probabilities of three networks, each trained on two thirds of the samples and applied to the
last third. A third run has threshold samples, which tell where wrong labels begin. Time is the CPU
time on one thread, of all trainings and of what follows. The default score of ``label_issues`` was
chosen with the seeds 101 and 102.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness.machine import processor
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn

import marginops
from marginops.commands.data import load_fashion_mnist
from marginops.training import TrainingDynamics, threshold_samples

CLASSES, BATCH, LEARNING_RATE = 10, 128, 0.05
RATES, SEEDS, EPOCHS = (0.2, 0.05), 3, 12
QUICK_SEEDS, QUICK_EPOCHS = 1, 4
FILE = Path(__file__).resolve().parents[1] / "results" / "claims-label-issues.json"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    data = load_fashion_mnist(options.data_dir)
    inputs, clean = data.train_inputs.flatten(1), data.train_target
    methods = {"label_issues": one_training, "threshold samples": with_threshold_samples}
    if importlib.util.find_spec("cleanlab"):
        import cleanlab.rank  # noqa: F401  so that its import is not part of the time

        methods["cleanlab, 3 folds"] = out_of_sample
    else:
        print("cleanlab is not installed and is left out; run pip install cleanlab")
    one_training(inputs[:1280], clean[:1280], 0, 1)  # the first batches of a process are slow

    seeds = QUICK_SEEDS if options.quick else SEEDS
    epochs = QUICK_EPOCHS if options.quick else EPOCHS
    rows = []
    for rate in RATES:
        for seed in range(seeds):
            labels, is_changed = changed_labels(clean, rate, seed)
            for name, method in methods.items():
                start = time.process_time()
                result = method(inputs, labels, seed, epochs)
                seconds = time.process_time() - start
                what = {"method": name, "rate": rate, "seed": seed, "epochs": epochs}
                rows.append({**what, **figures(*result, is_changed), "cpu_seconds": seconds})
                print(*(f"{key}={shown(value)}" for key, value in rows[-1].items()), flush=True)
    print("\nMeans over the seeds:")
    for rate in RATES:
        for name in methods:
            print(f"  {rate:4.0%}  {name:18}", means(rows, name, rate))
    output = options.output or (None if options.quick else FILE)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**machine(), "runs": rows}, indent=1) + "\n")
        print(f"written: {output}")
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed and fewer epochs")
    parser.add_argument("--output", type=Path, help="the result file")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the four files of Fashion-MNIST (default: that of the Debian package)",
    )
    return parser.parse_args(arguments)


def changed_labels(clean: Tensor, rate: float, seed: int) -> tuple[Tensor, Tensor]:
    """Symmetric label noise: the labels, and which of them were changed."""
    random = torch.Generator().manual_seed(1000 + seed)
    is_changed = torch.rand(len(clean), generator=random) < rate
    others = clean + torch.randint(1, CLASSES, clean.shape, generator=random)
    return torch.where(is_changed, others % CLASSES, clean), is_changed


def one_training(
    inputs: Tensor, labels: Tensor, seed: int, epochs: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The order of ``label_issues`` after one training: samples and their scores."""
    dynamics = TrainingDynamics(len(labels))
    train(inputs, labels, seed, epochs, CLASSES, dynamics.update)
    issues = dynamics.label_issues()
    return issues.indices, issues.scores, None


def with_threshold_samples(
    inputs: Tensor, labels: Tensor, seed: int, epochs: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same, and the samples whose labels are wrong by the rule of Pleiss et al. (2020)."""
    chosen, target = threshold_samples(labels, CLASSES, seed=seed)
    dynamics = TrainingDynamics(len(labels))
    train(inputs, target, seed, epochs, CLASSES + 1, dynamics.update)
    issues = dynamics.label_issues(threshold_samples=chosen)
    return issues.indices, issues.scores, issues.indices[: issues.num_issues]


def out_of_sample(
    inputs: Tensor, labels: Tensor, seed: int, epochs: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The label quality of cleanlab, and the samples whose labels are wrong by its own rule."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    fold = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)) % 3
    probabilities = torch.empty(len(labels), CLASSES)
    for part in range(3):
        kept, left_out = (fold != part).nonzero().squeeze(1), (fold == part).nonzero().squeeze(1)
        network = train(inputs[kept], labels[kept], seed, epochs, CLASSES)
        with torch.no_grad():
            probabilities[left_out] = network(inputs[left_out]).softmax(1)
    scores = get_label_quality_scores(labels.numpy(), probabilities.numpy())
    is_wrong = find_label_issues(labels.numpy(), probabilities.numpy(), n_jobs=1)
    found = torch.from_numpy(is_wrong).nonzero().squeeze(1)
    return torch.arange(len(labels)), torch.from_numpy(scores), found


def train(
    inputs: Tensor,
    target: Tensor,
    seed: int,
    epochs: int,
    outputs: int,
    update: Callable[..., Any] | None = None,
) -> nn.Module:
    """SGD with a learning rate that rises over a tenth of the steps and falls to 0 as a cosine."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(inputs.shape[1], 256), nn.ReLU(), nn.Linear(256, outputs))
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=LEARNING_RATE,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        fused=True,
    )
    steps = epochs * math.ceil(len(target) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step, steps))
    for indices in batches(len(target), epochs):
        logits, labels = network(inputs[indices]), target[indices]
        if update is None:
            loss = F.cross_entropy(logits, labels)
        else:
            loss = update(indices, logits, labels).mean_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def batches(samples: int, epochs: int) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(samples).split(BATCH)


def share(step: int, steps: int) -> float:
    """The learning rate at a step, as a share of the largest."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def figures(indices: Tensor, scores: Tensor, found: Tensor | None, is_changed: Tensor) -> Row:
    """How well small scores, and the samples that were found, tell which labels were changed."""
    changed, suspicion = is_changed[indices].numpy(), -scores.numpy()
    row = {
        "auroc": float(roc_auc_score(changed, suspicion)),
        "average_precision": float(average_precision_score(changed, suspicion)),
    }
    if found is not None:
        right = is_changed[found].sum().item()
        row |= {"precision": right / len(found), "recall": right / int(changed.sum())}
    return row


def means(rows: list[Row], name: str, rate: float) -> str:
    chosen = [row for row in rows if (row["method"], row["rate"]) == (name, rate)]
    keys = "auroc", "average_precision", "precision", "recall", "cpu_seconds"
    return "  ".join(
        f"{key} {shown(sum(row[key] for row in chosen) / len(chosen))}"
        for key in keys
        if key in chosen[0]
    )


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> Row:
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": torch.__version__,
        "marginops": marginops.__version__,
        "cleanlab": version("cleanlab"),
    }


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
