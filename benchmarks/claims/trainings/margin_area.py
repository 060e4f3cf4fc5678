"""Networks that separate their training samples, with their margins and test errors."""

import time
from typing import Any

import torch
from harness.data import Data, Sources, load
from torch import Tensor, nn
from torch.nn import functional

import marginops
from marginops.metrics import MarginDistribution
from trainings.loop import error_of, logits_of, uniform_batches
from trainings.networks import perceptron

BATCH_NORM, PERCEPTRON = "batch norm", "perceptron"
NORMS, READINGS = ("frobenius", "spectral"), ("fold", "last", "affine")
UNNORMALISED, BARTLETT = "none", "bartlett"


def run(settings: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """One network. Settings are JSON values, and so are the results."""
    return measured(load(settings["data"], sources), settings)


def measured(data: Data, settings: dict[str, Any]) -> dict[str, Any]:
    """Train a network until it separates its samples, and measure it.

    Returns:
        ``separates``, ``pre_epochs`` with partly random labels, ``epochs`` after that,
        ``train_error``, ``train_loss``, ``test_error``, ``training_seconds`` (CPU time of both
        trainings), and the ``statistics`` of :func:`statistics_of`, which are empty if the network
        does not separate its samples.
    """
    order = torch.randperm(len(data.train_target), generator=torch.Generator().manual_seed(0))
    chosen = order[: settings["samples"]]
    inputs, target = data.train_inputs[chosen], data.train_target[chosen]
    seed = settings["seed"]
    torch.manual_seed(seed)
    network = network_of(settings["architecture"], inputs, data.num_classes)
    scale_weights(network, settings["scale"])

    start = time.process_time()
    pre_epochs = 0
    if settings["share"]:
        labels = partly_random(target, settings["share"], data.num_classes, seed)
        pre_epochs = train(network, inputs, labels, settings)
    epochs = train(network, inputs, target, settings)
    seconds = time.process_time() - start

    error, loss = error_and_loss(network, inputs, target)
    separates = error == 0 and loss <= settings["loss"]
    return {
        "separates": separates,
        "pre_epochs": pre_epochs,
        "epochs": epochs,
        "train_error": error,
        "train_loss": rounded(loss),
        "test_error": error_of(network, data.test_inputs, data.test_target),
        "training_seconds": round(seconds, 3),
        "statistics": statistics_of(network, inputs, target) if separates else {},
    }


def network_of(name: str, inputs: Tensor, classes: int) -> nn.Module:
    """A perceptron, or convolutions with a batch norm after every layer but the last.

    No layer has biases. So the norms of the perceptron scale its logits exactly.
    """
    height, width = inputs.shape[2:]
    if name == PERCEPTRON:
        return perceptron(height * width, [128, 128], classes, bias=False)
    places = ((height + 3) // 4) * ((width + 3) // 4)
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * places, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, classes, bias=False),
    )


@torch.no_grad()
def scale_weights(network: nn.Module, scale: float) -> None:
    """Multiply the weights of all layers. Batch norms stay as they are."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.mul_(scale)


def partly_random(target: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """The labels, of which a share is drawn anew from all classes."""
    # Another seed than that of the batches, whose first order would be the same.
    generator = torch.Generator().manual_seed(10_000 + seed)
    chosen = torch.randperm(len(target), generator=generator)[: round(share * len(target))]
    labels = target.clone()
    labels[chosen] = torch.randint(classes, (len(chosen),), generator=generator)
    return labels


def train(network: nn.Module, inputs: Tensor, target: Tensor, settings: dict[str, Any]) -> int:
    """SGD with momentum until all samples are right and their mean loss is small.

    Returns:
        The number of epochs, which is limited.
    """
    optimizer = torch.optim.SGD(
        network.parameters(), lr=settings["learning_rate"], momentum=0.9, nesterov=True
    )
    batch_size = settings["batch_size"]
    batches = uniform_batches(len(inputs), batch_size, settings["seed"])
    for epoch in range(1, settings["epochs"] + 1):
        network.train()
        for _ in range(max(1, len(inputs) // batch_size)):
            batch = next(batches)
            optimizer.zero_grad()
            functional.cross_entropy(network(inputs[batch]), target[batch]).backward()
            optimizer.step()
        error, loss = error_and_loss(network, inputs, target)
        if error == 0 and loss <= settings["loss"]:
            return epoch
    return int(settings["epochs"])


def error_and_loss(network: nn.Module, inputs: Tensor, target: Tensor) -> tuple[float, float]:
    """The share of wrong samples and the mean cross-entropy, in evaluation mode."""
    logits = logits_of(network, inputs)
    error = (logits.argmax(1) != target).double().mean().item()
    return error, functional.cross_entropy(logits, target).item()


@torch.no_grad()
def statistics_of(network: nn.Module, inputs: Tensor, target: Tensor) -> dict[str, Any]:
    """What the normalised margins of the training samples are, for every normaliser.

    Returns:
        For ``none``, ``frobenius fold``, ... and ``bartlett``: the areas ``rank`` and ``cdf``, the
        ``smallest`` margin, the ``tenth`` percentile, and the logarithm of the ``norm``.
    """
    logits = logits_of(network, inputs)
    plain = marginops.classification_margin(logits, target)
    found = {UNNORMALISED: summary_of(plain) | {"norm": 0.0}}
    has_norm = any(isinstance(one, nn.BatchNorm1d | nn.BatchNorm2d) for one in network.modules())
    for norm in NORMS:
        for reading in READINGS if has_norm else READINGS[:1]:
            log_norm = marginops.log_norm_product(network, norm=norm, batch_norm=reading)
            margins = marginops.classification_margin(logits, target, log_norm=log_norm)
            found[f"{norm} {reading}"] = summary_of(margins) | {"norm": rounded(log_norm.item())}
    log_norm = marginops.log_spectral_complexity(network)
    margins = marginops.classification_margin(logits, target, log_norm=log_norm)
    found[BARTLETT] = summary_of(margins) | {"norm": rounded(log_norm.item())}
    return found


def summary_of(margins: Tensor) -> dict[str, float]:
    """The areas, the smallest margin and the tenth percentile."""
    metric = MarginDistribution(exact=True, quantiles=[0.1])
    metric.update(margins)
    summary = metric.compute()
    return {
        "rank": rounded(summary.area.item()),
        "cdf": rounded(summary.area_cdf.item()),
        "smallest": rounded(summary.minimum.item()),
        "tenth": rounded(summary.quantiles.item()),
    }


def rounded(value: float) -> float:
    """Six digits."""
    return float(f"{value:.6g}")
