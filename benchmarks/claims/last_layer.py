"""Does gradient flow maximise the margin in a norm of only the parameters with the largest rate?

Three parts: rates of networks, a flow whose largest margin is known, and networks that train far
past separation with and without a normalisation layer before the last layer.

    python benchmarks/claims/last_layer.py --quick    # a minute
    python benchmarks/claims/last_layer.py            # a quarter of an hour
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from harness.claim import Claim, Row, Scope, Settings
from harness.command import main
from harness.data import DIGITS, FASHION_MNIST
from last_layer_report import (
    FROBENIUS,
    LARGEST,
    LOSSES,
    NETWORKS,
    NORMS,
    TAU,
    data_of,
    part_of,
    report,
)
from trainings.last_layer import RANDOM, run
from trainings.product_flow import PLANE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATEMENT = (
    "Gradient flow maximises the margin in a norm of only the parameters with the largest rate. "
    "Behind a normalisation layer these are the weight and the bias of the last layer, and the "
    "features collapse to a simplex."
)

PROTOCOL = """
**How it was measured.** A network has rates if its output grows by $e^\\alpha$ when every parameter
$\\theta_i$ grows by $e^{\\alpha\\lambda_i}$. Part 1 compares the rates that `homogeneity.rates`
finds with those of the theory. Then `rescale` grows the parameters at these rates ($\\alpha = 1$,
float64), and the output is compared with e times the output before.

Part 2 follows the gradient flow of `u · x + (v * w) · z`. The rate of `u` is 1, that of `v` and `w`
is 1/2, so only the norm of `u` counts. The theory says which margin the flow approaches: the
largest one for a given norm of `u`, whatever `v` and `w` are. A solver of this convex problem gives
the optimum, with a bound on its error; it knows nothing of the flow. The flow is that of the
logarithm of the loss, which follows the same path in another time. An implicit method (BDF,
tolerance 1e-8) integrates it from normally distributed parameters until the norm of `u` is 1000.
The data are random points in the plane (`x` and `z` are one number each), and two kinds of digits
(`z` is the fifth of the eight rows of pixels, `x` the rest). A linear function of `x` and `z`
separates them, and none of `z` alone does. Every seed has its own data and its own start.

Part 3 trains ReLU networks with two hidden layers and biases on samples of all ten classes: 50 of
each class of Fashion-MNIST with a width of 128 and 6,000 steps, and 100 of each digit with a width
of 64 and 5,000 steps. Between the last ReLU and the last linear layer is a batch norm, a layer
norm, or nothing. The norms have no parameters, so the three networks of a seed start with equal
parameters. Every step takes all samples and goes down the logarithm of the loss, far past
separation. A step that would not decrease the loss is not done and halves the next one; any other
step makes the next one a tenth longer. There is no weight decay. `NeuralCollapse` measures the
inputs of the last layer on the training samples: 0 is full collapse. The smallest margin is divided
by the two versions of the scale that `log_scale` gives. After separation it is compared with its
value ten steps before. The Frobenius version divides the margin by the norm of all parameters, to
the power of the number of linear layers after the norm.

**Fixed before the runs.** The data, widths, numbers of steps and the norm of 1000 were chosen with
seeds of 100 and more. The claim holds if (1) all rates are exact and the output grows as they say,
up to rounding; (2) every flow ends within 1 % of its optimum; (3) on every data set and behind both
norms, NC1 and both parts of NC2 are smaller than without a norm after the same number of steps (the
interval of the ratio is below 1), and in every run the margin divided by the norm of the last layer
is larger at the end than at separation. If only (1) and (2) hold, the claim is partly confirmed.
"""


def settings(scope: Scope) -> list[Settings]:
    """Every network of the rates, every flow, and every training."""
    runs: list[Settings] = [
        {"part": "rates", "data": RANDOM, "network": network, "width": 64, "seed": scope.seeds[0]}
        for network in NETWORKS
    ]
    runs += [
        {"part": "flow", "data": data, "loss": loss, "seed": seed}
        | {"points": 200, "final_norm": 1000.0}
        for data in (PLANE, DIGITS)
        for loss in LOSSES
        for seed in scope.seeds
    ]
    sizes: dict[str, dict[str, Any]] = {
        FASHION_MNIST: {"width": 128, "each": 50, "steps": 6000},
        DIGITS: {"width": 64, "each": 100, "steps": 5000},
    }
    if scope.quick:
        sizes = {
            FASHION_MNIST: {"width": 128, "each": 20, "steps": 1000},
            DIGITS: {"width": 64, "each": 50, "steps": 1000},
        }
    return runs + [
        {"part": "collapse", "data": data, "norm": norm, "seed": seed} | sizes[data]
        for data in (FASHION_MNIST, DIGITS)
        if scope.sources.has(data)
        for seed in scope.seeds
        for norm in NORMS
    ]


def draw(rows: list[Row], figure: "Figure") -> None:
    """The distance from the optimum, normalised margins, and NC1."""
    figure.set_size_inches(12, 4.2)
    left, middle, right = figure.subplots(1, 3)
    draw_flows(rows, left)
    draw_margins(rows, middle)
    draw_collapse(rows, right)


def draw_flows(rows: list[Row], axes: "Axes") -> None:
    """How far each flow is from its optimum, over the norm."""
    for data, color in zip(data_of(rows, "flow"), ("C0", "C1"), strict=False):
        for number, row in enumerate(part_of(rows, "flow", data=data, loss="logistic")):
            norms, margins = np.array(row["curve"]).T
            kept = norms >= 1
            distance = 100 * (1 - margins[kept] / row["optimum"])
            label = data if number == 0 else None
            axes.plot(norms[kept], distance, color=color, alpha=0.7, label=label)
    axes.axhline(1, color="black", linestyle=":", label="1 %")
    axes.set(
        title="Gradient flow approaches the optimum",
        xlabel="norm of the parameters with rate 1",
        ylabel="distance of the margin from its optimum (%)",
        xscale="log",
        yscale="log",
        ylim=(0.005, 300),
    )
    axes.legend()


def draw_margins(rows: list[Row], axes: "Axes") -> None:
    """The normalised margins of one data set, as shares of their ends."""
    data = data_of(rows, "collapse")[0]
    lines = (
        ("batch", LARGEST, "batch norm, last layer", "C0", "-"),
        ("layer", LARGEST, "layer norm, last layer", "C1", "-"),
        ("none", LARGEST, "no norm, last bias", "C2", "-"),
        ("none", TAU, "no norm, tau", "C3", "-"),
        ("none", FROBENIUS, "no norm, Frobenius", "black", ":"),
    )
    for norm, reading, label, color, style in lines:

        def share(row: Row, reading: int = reading) -> np.ndarray:
            margins = np.array(row["curve"])[:, 2 + reading]
            return margins / margins[-1]

        some = part_of(rows, "collapse", data=data, norm=norm)
        draw_mean(axes, some, share, label, color, style)
    axes.set(
        title=f"Smallest normalised margin, {data}",
        xlabel="step",
        ylabel="share of its value at the end",
        xscale="log",
        ylim=(-0.3, 1.1),
    )
    axes.legend(fontsize="small")


def draw_collapse(rows: list[Row], axes: "Axes") -> None:
    """NC1 over the steps."""
    for data, style in zip(data_of(rows, "collapse"), ("-", "--"), strict=False):
        for norm, color in zip(("batch", "layer", "none"), ("C0", "C1", "C2"), strict=True):
            text = "no norm" if norm == "none" else NORMS[norm]

            def values(row: Row) -> np.ndarray:
                return np.array(row["curve"])[:, 5]

            some = part_of(rows, "collapse", data=data, norm=norm)
            draw_mean(axes, some, values, f"{text}, {data}", color, style)
    axes.set(
        title="Variability within the classes",
        xlabel="step",
        ylabel="NC1",
        xscale="log",
        yscale="log",
        ylim=(1e-5, 10),
    )
    axes.legend(fontsize="small")


def draw_mean(
    axes: "Axes",
    rows: list[Row],
    values: Callable[[Row], np.ndarray],
    label: str,
    color: str,
    style: str = "-",
) -> None:
    """The mean of the seeds over the steps."""
    steps = np.array(rows[0]["curve"])[:, 0]
    axes.plot(steps, np.mean([values(row) for row in rows], 0), style, color=color, label=label)


CLAIM = Claim(
    name="last_layer",
    title="Behind a normalisation layer only the last layer counts",
    statement=STATEMENT,
    source="Kunin, Yamamura, Ma and Ganguli, 2023",
    protocol=PROTOCOL,
    settings=settings,
    run=run,
    report=report,
    draw=draw,
)


if __name__ == "__main__":
    sys.exit(main(CLAIM))
