"""The equations between the rates of the parameters of a network.

The rate of a value in the network is a linear form in the rates of the parameters. The form is the
array of its coefficients.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Form = NDArray[np.float64]


class NotQuasiHomogeneousError(ValueError):
    """The network is not quasi-homogeneous: no rates of the parameters give its output rate 1."""


@dataclass(frozen=True)
class Value:
    """What is known about a tensor in the network.

    Attributes:
        rate: The rate as a linear form. None for a tensor of zeros, which has every rate.
        parameters: Indices of the parameters that the tensor depends on.
        weights: Indices of the parameters of which it is a view or a sum. Empty if it depends on
            the input of the network.
        varies: Whether it depends on the input of the network.
        floating: Whether it is a floating-point tensor. Integers and booleans have no rate.
    """

    rate: Form | None
    parameters: frozenset[int] = frozenset()
    weights: frozenset[int] = frozenset()
    varies: bool = False
    floating: bool = True


@dataclass(frozen=True)
class Equation:
    """A form that has to be 0. The message says what is impossible otherwise."""

    form: Form
    message: str


@dataclass
class System:
    """The equations of one network.

    Attributes:
        size: The number of parameters.
        equations: The equations in the order of the operations of the network.
        factors: Indices of the parameters that multiply something. A bias only shifts.
        normalizing: Indices of the parameters upstream of a normalisation, and of those in its
            scale and shift.
    """

    size: int
    equations: list[Equation] = field(default_factory=list)
    factors: set[int] = field(default_factory=set)
    normalizing: set[int] = field(default_factory=set)

    def constant(self) -> Form:
        """The rate 0."""
        return np.zeros(self.size)

    def parameter(self, index: int) -> Value:
        """The value of a parameter."""
        rate = self.constant()
        rate[index] = 1
        return Value(rate, frozenset({index}), frozenset({index}))

    def require(self, form: Form | None, message: str) -> None:
        """Add the equation that a form is 0."""
        if form is not None and form.any():
            self.equations.append(Equation(form, message))

    def equal(self, values: Sequence[Value], message: str) -> Form | None:
        """Require that all values have the same rate, and return it. Zeros have every rate."""
        forms = [value.rate for value in values if value.rate is not None]
        for form in forms[1:]:
            self.require(forms[0] - form, message)
        return forms[0] if forms else None

    def product(self, values: Iterable[Value]) -> Form | None:
        """The rate of a product: the sum of the rates of its factors."""
        rate: Form | None = self.constant()
        for value in values:
            self.factors |= value.weights
            rate = None if rate is None or value.rate is None else rate + value.rate
        return rate
