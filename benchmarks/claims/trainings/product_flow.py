"""Gradient flow of a small model whose largest margin is known: a part of the last-layer claim."""

import math
from typing import Any

import numpy as np
import torch
from harness.data import DIGITS, Sources, load
from scipy.integrate import solve_ivp
from scipy.optimize import linprog, nnls
from scipy.special import log_expit, logsumexp, softmax
from torch import Tensor, nn

from marginops import homogeneity

PLANE = "points in the plane"
# The pixels of the middle row of an image of digits get two factors each, the others get one.
MIDDLE_ROW = range(32, 40)


class Products(nn.Module):
    """A linear model: the first inputs have one factor each, and the rest have two each."""

    def __init__(self, singles: int, pairs: int) -> None:
        super().__init__()
        self.single = nn.Parameter(torch.randn(singles))
        self.first, self.second = (nn.Parameter(torch.randn(pairs)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The output, which is positive for one class and negative for the other."""
        return x @ torch.cat([self.single, self.first * self.second])


def signed_samples(settings: dict[str, Any], sources: Sources) -> tuple[np.ndarray, int]:
    """Inputs times their label of +1 or -1, and how many of the columns have one factor.

    A linear function separates the classes, and none of the other columns alone does.
    """
    generator = np.random.default_rng(settings["seed"])
    while True:
        if settings["data"] == PLANE:
            angle = generator.uniform(math.pi / 6, math.pi / 3)
            points = generator.normal(size=(settings["points"], 2))
            output = points @ [math.cos(angle), math.sin(angle)]
            kept = abs(output) > 1
            signed, singles = points[kept] * np.sign(output[kept])[:, None], 1
        else:
            data = load(DIGITS, sources)
            pair = generator.choice(10, 2, replace=False)
            inputs, target = data.train_inputs.flatten(1).double().numpy(), data.train_target
            parts = [inputs[target.numpy() == label] for label in pair]
            signed = np.concatenate([parts[0], -parts[1]])
            order = [*sorted(set(range(64)) - set(MIDDLE_ROW)), *MIDDLE_ROW]
            signed, singles = signed[:, order], 64 - len(MIDDLE_ROW)
        if separates(signed) and not separates(signed[:, singles:]):
            return signed, singles


def separates(signed: np.ndarray) -> bool:
    """Whether a linear function is positive on all rows."""
    bounds = [(None, None)] * signed.shape[1]
    found = linprog(np.zeros(signed.shape[1]), -signed, -np.ones(len(signed)), bounds=bounds)
    return found.status == 0


def largest_margin(signed: np.ndarray, singles: int) -> tuple[np.ndarray, float]:
    """The coefficients with the largest margin if the norm of the first ones is 1.

    The dual problem looks for the shortest mean of the first columns, over all weights of the rows
    for which the mean of the other columns is 0. The optimum lies between the margin of the
    coefficients and the length of that mean. The second value is how far these are apart, as a
    share.
    """
    first, rest = signed[:, :singles], signed[:, singles:]
    large = 1e4
    system = np.concatenate([first.T, large * rest.T, np.full((1, len(signed)), large)])
    weights, _ = nnls(system, np.append(np.zeros(signed.shape[1]), large))
    mean = weights @ first / weights.sum()
    length = np.linalg.norm(mean)
    direction = mean / length
    # The other coefficients, and the margin, for this direction of the first ones.
    found = linprog(
        np.append(np.zeros(rest.shape[1]), -1),
        np.column_stack([-rest, np.ones(len(rest))]),
        first @ direction,
        bounds=[(None, None)] * (rest.shape[1] + 1),
    )
    return np.append(direction, found.x[:-1]), 1 + found.fun / length


def run_flow(settings: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Gradient flow of the loss in a time that runs faster as the loss falls."""
    signed, singles = signed_samples(settings, sources)
    pairs = signed.shape[1] - singles
    model = Products(singles, pairs).double()
    inputs = torch.from_numpy(signed)
    rates = homogeneity.rates(model, inputs)
    start = np.concatenate([value.detach().numpy() for value in model.parameters()])

    def velocity(_: float, parameters: np.ndarray) -> np.ndarray:
        single, first, second = np.split(parameters, [singles, singles + pairs])
        margins = signed @ np.append(single, first * second)
        slope = slopes(margins, settings["loss"]) @ signed
        return np.concatenate([slope[:singles], slope[singles:] * second, slope[singles:] * first])

    def reached(_: float, parameters: np.ndarray) -> float:
        return float(np.linalg.norm(parameters[:singles])) - settings["final_norm"]

    reached.terminal = True  # type: ignore[attr-defined]
    flow = solve_ivp(velocity, (0, 1e9), start, "BDF", events=reached, rtol=1e-8, atol=1e-8)
    curve = []
    for index in np.unique(np.geomspace(1, len(flow.t), 40).astype(int)) - 1:
        values = torch.from_numpy(flow.y[:, index]).split([singles, pairs, pairs])
        named = dict(zip(rates, values, strict=True))
        margins = inputs @ torch.cat([values[0], values[1] * values[2]])
        scale = homogeneity.log_scale(named, rates, version="lambda_max")
        normalized = margins * (-scale).exp()
        norm = homogeneity.lambda_seminorm(named, rates, largest_only=True)
        curve.append([float(f"{value:.5g}") for value in (norm, normalized.min())])
    best, gap = largest_margin(signed, singles)
    euclidean, _ = largest_margin(signed, signed.shape[1])
    norm_of_singles = np.linalg.norm(euclidean[:singles])
    return {
        "samples": len(signed),
        "optimum": float((signed @ best).min()),
        "optimum_gap": float(gap),
        "reached": normalized.min().item(),
        "euclidean": float((signed @ euclidean).min() / norm_of_singles),
        "norm_reached": norm.item(),
        "curve": curve,
    }


def slopes(margins: np.ndarray, loss: str) -> np.ndarray:
    """Minus the derivatives of the logarithm of the loss, a sum of samples, by the margins."""
    if loss == "exponential":
        return softmax(-margins)
    # The logarithm of log(1 + exp(-margin)) is -margin where the exponential is negligible.
    logs = np.where(margins > 36, -margins, np.log(np.logaddexp(0, -np.minimum(margins, 36))))
    return np.exp(log_expit(-margins) - logsumexp(logs))
