"""Change labels of a data set, and order its samples by the suspicion of a method."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from harness.data import Sources, load
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import marginops
from marginops.training import Stopwatch, TrainingDynamics, threshold_samples

from .loop import logits_of, warm_up_and_cosine
from .networks import perceptron

LABEL_ISSUES, THRESHOLD = "label_issues", "threshold samples"
LOSS, CLEANLAB = "loss of the trained network", "cleanlab"
SYMMETRIC, SIMILAR = "symmetric noise", "noise among similar classes"
BATCH = 128
# Classes of Fashion-MNIST that are mistaken for each other: T-shirt and shirt, pullover and coat,
# sneaker and ankle boot. No label of the other classes is changed.
SIMILAR_CLASSES = {0: 6, 6: 0, 2: 4, 4: 2, 7: 9, 9: 7}
SHEET = 40
# Scores of one training, beside which the margin of the trained network stands.
TRAINED = "margin of the trained network"
SCORES = ("aum", "margin_average", "margin")

Settings = dict[str, Any]


class Found(NamedTuple):
    """What a method found.

    Attributes:
        indices: The samples that it judges.
        scores: Their scores, of which small ones are suspicious.
        flagged: The samples whose labels are wrong by the method's own rule; None without a rule.
        more: Further results of the run.
    """

    indices: Tensor
    scores: Tensor
    flagged: Tensor | None = None
    more: Callable[[Tensor], dict[str, Any]] | None = None


def run(settings: Settings, sources: Sources) -> dict[str, Any]:
    """Change labels, let a method order the samples, and count what it found."""
    data = load(settings["data"], sources)
    inputs = data.train_inputs[: settings["samples"]]
    clean = data.train_target[: settings["samples"]]
    labels, is_changed = changed_labels(clean, settings)
    method = METHODS[settings["method"]]
    # The first batches of a process are slow, so they are not measured.
    few = settings | {"epochs": 1}
    method(inputs[: 10 * BATCH], clean[: 10 * BATCH], few, Stopwatch())
    stopwatch = Stopwatch()
    found = method(inputs, labels, settings, stopwatch)
    return {
        **(figures(found, is_changed) if is_changed.any() else {}),
        **(found.more(is_changed) if found.more else {}),
        "process_seconds": round(stopwatch.process_seconds, 4),
    }


def changed_labels(clean: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The labels with noise, and which of them were changed.

    Symmetric noise changes each label with a probability, to one of all other classes. The other
    noise changes only labels of similar classes, with the same probability, to the similar class.
    """
    random = torch.Generator().manual_seed(1000 + settings["seed"])
    is_changed = torch.rand(len(clean), generator=random) < settings["rate"]
    classes = int(clean.max()) + 1
    others = (clean + torch.randint(1, classes, clean.shape, generator=random)) % classes
    if settings["noise"] == SIMILAR:
        others = torch.tensor([SIMILAR_CLASSES.get(i, i) for i in range(classes)])[clean]
    is_changed &= others != clean
    return torch.where(is_changed, others, clean), is_changed


def one_training(inputs: Tensor, labels: Tensor, settings: Settings, watch: Stopwatch) -> Found:
    """The order of ``label_issues`` after one training.

    Outside of the measured time it also gets other orders of the same training, or the first
    samples with the predictions of the network.
    """
    with watch:
        dynamics = TrainingDynamics(len(labels))
        network = train(inputs, labels, outputs_of(labels), settings, dynamics)
        issues = dynamics.label_issues()

    def more(is_changed: Tensor) -> dict[str, Any]:
        logits = logits_of(network, inputs)
        if not is_changed.any():
            first = issues.indices[:SHEET]
            predicted = logits[first].argmax(1).tolist()
            return {
                "sheet": {
                    "indices": first.tolist(),
                    "labels": labels[first].tolist(),
                    "predictions": predicted,
                }
            }
        scores = {name: getattr(dynamics, name) for name in SCORES}
        scores[TRAINED] = marginops.classification_margin(logits, labels)
        return {"auroc_by": {name: auroc(values, is_changed) for name, values in scores.items()}}

    return Found(issues.indices, issues.scores, more=more)


def with_threshold_samples(
    inputs: Tensor, labels: Tensor, settings: Settings, watch: Stopwatch
) -> Found:
    """The order of a training with threshold samples, and the labels beyond their threshold."""
    with watch:
        outputs = outputs_of(labels)
        chosen, target = threshold_samples(labels, outputs, seed=settings["seed"])
        dynamics = TrainingDynamics(len(labels))
        train(inputs, target, outputs + 1, settings, dynamics)
        issues = dynamics.label_issues(threshold_samples=chosen)
    return Found(issues.indices, issues.scores, issues.indices[: issues.num_issues])


def loss_of_trained(inputs: Tensor, labels: Tensor, settings: Settings, watch: Stopwatch) -> Found:
    """The order by the loss of the trained network, the largest loss first."""
    with watch:
        network = train(inputs, labels, outputs_of(labels), settings)
        loss = cross_entropy(logits_of(network, inputs), labels, reduction="none")
    return Found(torch.arange(len(labels)), -loss)


def out_of_sample(inputs: Tensor, labels: Tensor, settings: Settings, watch: Stopwatch) -> Found:
    """The label quality of cleanlab, and the samples whose labels are wrong by its own rule.

    The probabilities of a sample are those of a network that was trained on the other folds. The
    rule takes no part in the order, so its time is not measured.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    folds = settings["folds"]
    with watch:
        random = torch.Generator().manual_seed(settings["seed"])
        fold = torch.randperm(len(labels), generator=random) % folds
        probabilities = torch.empty(len(labels), outputs_of(labels))
        for part in range(folds):
            kept, out = ((fold == part) == is_out for is_out in (False, True))
            network = train(inputs[kept], labels[kept], outputs_of(labels), settings)
            probabilities[out] = logits_of(network, inputs[out]).softmax(1)
        scores = get_label_quality_scores(labels.numpy(), probabilities.numpy())
    is_wrong = find_label_issues(labels.numpy(), probabilities.numpy(), n_jobs=1)
    flagged = torch.from_numpy(is_wrong).nonzero().squeeze(1)
    return Found(torch.arange(len(labels)), torch.from_numpy(scores), flagged)


METHODS = {
    LABEL_ISSUES: one_training,
    THRESHOLD: with_threshold_samples,
    LOSS: loss_of_trained,
    CLEANLAB: out_of_sample,
}


def outputs_of(labels: Tensor) -> int:
    """The number of classes."""
    return int(labels.max()) + 1


def train(
    inputs: Tensor,
    target: Tensor,
    outputs: int,
    settings: Settings,
    dynamics: TrainingDynamics | None = None,
) -> nn.Module:
    """A new perceptron after some epochs, with dynamics of its samples if they are given."""
    torch.manual_seed(settings["seed"])
    network = perceptron(inputs[0].numel(), [256], outputs)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings["learning_rate"],
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        fused=True,
    )
    steps = settings["epochs"] * math.ceil(len(target) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_and_cosine(step, steps)
    )
    for rows in batches(len(target), settings["epochs"], settings["seed"]):
        logits = network(inputs[rows])
        if dynamics is None:
            loss = cross_entropy(logits, target[rows])
        else:
            loss = dynamics.update(rows, logits, target[rows]).mean_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def batches(size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Every sample once an epoch, so that each has the same number of visits."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(size, generator=random).split(BATCH)


def figures(found: Found, is_changed: Tensor) -> dict[str, float]:
    """How well small scores, and the flagged samples, tell which labels were changed."""
    changed = is_changed[found.indices]
    row = {
        "auroc": auroc(found.scores, changed),
        "average_precision": float(
            average_precision_score(changed.numpy(), -found.scores.double().numpy())
        ),
    }
    if found.flagged is not None:
        right = int(is_changed[found.flagged].sum())
        row["precision"] = right / max(1, len(found.flagged))
        row["recall"] = right / int(changed.sum())
    return row


def auroc(scores: Tensor, is_changed: Tensor) -> float:
    """The share of pairs of a changed and an unchanged label of which the former scores lower."""
    return float(roc_auc_score(is_changed.numpy(), -scores.double().numpy()))
