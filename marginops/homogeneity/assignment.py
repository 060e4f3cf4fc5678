"""Rates of a network's parameters: one linear system, solved for its most even solution."""

from bisect import bisect_left
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..networks import unwrap
from .program import Program
from .system import NotQuasiHomogeneousError, System
from .trace import Network, exported


def rates(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> dict[str, float]:
    r"""Rates at which the parameters grow when the output of a network doubles.

    A network :math:`f` is quasi-homogeneous with rates :math:`\lambda_i \ge 0` when

    .. math:: f(x; e^{\alpha \lambda_1} \theta_1, e^{\alpha \lambda_2} \theta_2, \dots)
        = e^{\alpha} f(x; \theta) \quad \text{for all } \alpha

    (Kunin, Yamamura, Ma, Ganguli, 2023). Then :math:`\sum_i \lambda_i \langle \theta_i,
    \partial f / \partial \theta_i \rangle = f`. The rates come from the operations of the network:
    every value has a rate, inputs, buffers and constants 0, the output 1, and

    ============================================== ==============================================
    convolution, linear, product                   adds the rates of what it multiplies
    bias, sum, difference, concatenation           all have the same rate
    ReLU, leaky ReLU, pooling, views, mean, sum    keeps the rate of its input
    quotient, power, square root                   subtracts, multiplies, halves it
    layer, group, instance, RMS norm               starts again at 0; scale and shift have the
                                                   rate of the result
    batch norm with its running statistics         the same, and what feeds it has rate 0, since
                                                   the statistics do not grow with it
    ============================================== ==============================================

    Where several assignments satisfy these equations, what feeds a normalisation and the scales
    and shifts of normalisations have rates as small as possible (0 almost always); then the
    largest rate among the parameters that multiply something is as small as possible, then the
    next largest, and so on. So there is one answer: 1/L each for a network of L layers without
    biases, l/L for the bias of layer l, and 1 for the last layer and 0 before it where there is
    normalisation. Parameters that the output does not depend on have rate 0. Weight normalisation
    ``g v / |v|`` puts the rate on g and 0 on v.

    Args:
        model: Returns one tensor of floating point. Runs in evaluation mode. Wrappers are taken
            off first, see :func:`marginops.networks.unwrap`.
        example_input: What it is called with, a tensor or a tuple of positional arguments, on its
            device. Only the shapes and dtypes matter.

    Returns:
        The rate of every parameter, by its name in ``model.named_parameters()`` and in that order
        (shared parameters once, under their first name).

    Raises:
        NotQuasiHomogeneousError: There are no such rates. The message names the operation and
            the module: tanh, GELU, SiLU, sigmoid, softmax, attention and others that have none;
            operations without a rule; and sums whose terms cannot have the same rate.
        RuntimeError: ``torch.export`` cannot trace the model; its error is the cause.
        ImportError: SciPy, which solves the system, is missing.
        TypeError, ValueError: An argument has the wrong type, or the output is not one tensor.

    Small constants that keep quotients finite (``eps`` of layer, group, instance and RMS norm) are
    taken as 0. Modes of the modules are restored. Traces the model once with ``torch.export``,
    without running it on data: seconds for a deep network.

    Example:
        >>> import torch
        >>> from marginops.homogeneity import rates
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        ... )
        >>> rates(network, torch.randn(1, 4))
        {'0.weight': 0.5, '0.bias': 0.5, '2.weight': 0.5, '2.bias': 1.0}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, (Tensor, tuple)):
        raise TypeError(
            "example_input: expected a tensor or a tuple of arguments, "
            f"got {type(example_input).__name__}"
        )
    check_solver()
    model = unwrap(model)
    names = [name for name, _ in model.named_parameters()]
    if not names:
        raise ValueError("model: expected at least one parameter, got none")
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    network = Network(model, exported(model, arguments), names)
    system = network.system
    program = Program(_matrix(system), network.output)
    if not program.is_feasible():
        raise _blame(network)
    program.minimize_sum(sorted(system.normalizing))
    program.level(sorted(system.factors))
    program.follow(sorted(set(range(len(names))) - system.factors))
    return dict(zip(names, program.lower.tolist(), strict=True))


def check_solver() -> None:
    """SciPy is there."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'rates: needs SciPy, which is missing: pip install "marginops[homogeneity]"'
        ) from error


def _matrix(system: System, count: int | None = None) -> NDArray[np.float64]:
    forms = [equation.form for equation in system.equations[:count]]
    return np.unique(np.reshape(forms, (-1, system.size)), axis=0)


def _blame(network: Network) -> NotQuasiHomogeneousError:
    """The first operation that leaves no rates with which the output has rate 1."""
    system = network.system

    def fails(count: int) -> bool:
        return not Program(_matrix(system, count), network.output).is_feasible()

    first = bisect_left(range(len(system.equations) + 1), True, key=fails)
    if first == 0:
        return NotQuasiHomogeneousError(
            f"rates: the output, {network.place}, does not grow with any parameter"
        )
    return NotQuasiHomogeneousError(
        f"rates: {system.equations[first - 1].message} when the output has rate 1"
    )
