"""Rates of the parameters of a network: the most even solution of a system of equations."""

from bisect import bisect_left
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .._checks import check_not_distributed
from ..networks import unwrap
from .equations import NotQuasiHomogeneousError, System
from .graph import Network, export
from .linear_program import LinearProgram
from .parameters import check_ordinary


def rates(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> dict[str, float]:
    r"""Rates at which the parameters of a network grow with its output.

    A network :math:`f` is quasi-homogeneous with rates :math:`\lambda_i \ge 0` if

    .. math:: f(x; e^{\alpha \lambda_1} \theta_1, e^{\alpha \lambda_2} \theta_2, \dots)
        = e^{\alpha} f(x; \theta) \quad \text{for all } \alpha

    (Kunin, Yamamura, Ma, Ganguli, 2023). Then :math:`\sum_i \lambda_i \langle \theta_i,
    \partial f / \partial \theta_i \rangle = f`.

    The function gives every value in the network a rate. Inputs, buffers and constants have rate
    0, and the output has rate 1. The operations of the network give the equations:

    ============================================== ==============================================
    convolution, linear, product                   the result has the sum of the rates of the
                                                   factors
    bias, addition, subtraction, concatenation     all terms and the result have the same rate
    ReLU, leaky ReLU, pooling, views, mean and     the result has the rate of the input
    sum over dimensions
    quotient, power, square root                   the rates are subtracted, multiplied by the
                                                   exponent, halved
    layer, group, instance, RMS norm               the normalised input has rate 0; scale and
                                                   shift have the rate of the result
    batch norm with its running statistics         the same, and the input has rate 0, because
                                                   the statistics do not grow with it
    ============================================== ==============================================

    If several assignments satisfy the equations, the function chooses one. First, the rates of
    parameters that feed a normalisation, and of scales and shifts of normalisations, are as small
    as possible (0 in almost all networks). Next, the largest rate among the parameters that
    multiply something is as small as possible, then the next largest, and so on. The result is
    unique. For L layers without normalisation every weight has rate 1/L, and the bias of layer l
    has rate l/L. With normalisation the last layer has rate 1 and all layers before it have rate
    0. Parameters that do not influence the output have rate 0. In weight normalisation
    ``g v / |v|`` the rate belongs to g, and v has rate 0.

    Args:
        model: A network that returns one floating-point tensor, or an object or mapping that holds
            it as ``logits``. It is traced in evaluation mode, without its wrappers, see
            :func:`marginops.networks.unwrap`.
        example_input: A tensor or a tuple of positional arguments of ``model``, on its device.
            Only the shapes and dtypes matter.

    Returns:
        The rate of every parameter, by its name in ``model.named_parameters()`` and in that order.
        A shared parameter has one entry, under its first name.

    Raises:
        NotQuasiHomogeneousError: There are no such rates. The message names the operation and
            the module. The operation never has a rate (tanh, GELU, SiLU, sigmoid, softmax,
            attention and others), has no rule here, or is a sum whose terms cannot have the same
            rate.
        RuntimeError: ``torch.export`` cannot trace the model. Its error is the cause.
        ImportError: SciPy, which solves the equations, is missing.
        TypeError, ValueError: An argument has the wrong type, the model has no parameter, a
            parameter is lazy, sharded or quantised, two parameters share memory, or the output is
            not one floating-point tensor.

    The function takes the small constants that keep quotients finite (``eps`` of layer, group,
    instance and RMS norm) as 0. It restores the modes of all modules. It traces the model once with
    ``torch.export`` and does not run it on data. This takes seconds for a deep network.

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
    names = []
    for name, value in model.named_parameters():
        check_ordinary("model", name, value)
        names.append(name)
    if not names:
        raise ValueError("model: expected at least one parameter, got none")
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    for argument in arguments:
        if isinstance(argument, Tensor):
            check_not_distributed("example_input", argument)
    network = Network(model, export(model, arguments), names)
    system = network.system
    program = LinearProgram(_matrix(system), network.output)
    if not program.is_feasible():
        raise _blame(network)
    program.minimize_sum(sorted(system.normalizing))
    program.level(sorted(system.factors))
    program.follow(sorted(set(range(len(names))) - system.factors))
    return dict(zip(names, program.lower.tolist(), strict=True))


def check_solver() -> None:
    """Check that SciPy is installed."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "rates: expected SciPy to be installed, got no SciPy; run pip install "
            '"marginops[homogeneity]"'
        ) from error


def _matrix(system: System, count: int | None = None) -> NDArray[np.float64]:
    forms = [equation.form for equation in system.equations[:count]]
    return np.unique(np.reshape(forms, (-1, system.size)), axis=0)


def _blame(network: Network) -> NotQuasiHomogeneousError:
    """The error for the first operation whose equation makes the system unsolvable."""
    system = network.system

    def fails(count: int) -> bool:
        return not LinearProgram(_matrix(system, count), network.output).is_feasible()

    first = bisect_left(range(len(system.equations) + 1), True, key=fails)
    if first == 0:
        return NotQuasiHomogeneousError(
            f"rates: the output, {network.place}, does not grow with any parameter"
        )
    return NotQuasiHomogeneousError(
        f"rates: {system.equations[first - 1].message} when the output has rate 1"
    )
