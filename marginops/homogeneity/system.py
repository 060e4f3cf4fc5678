"""Rates of a network's values as linear forms in those of its parameters, and their equations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Form = NDArray[np.float64]


class NotQuasiHomogeneousError(ValueError):
    """No rates of the parameters make the output of a network grow at rate 1."""


@dataclass(frozen=True)
class Value:
    """What is known of a tensor in the network.

    Attributes:
        rate: Coefficients of the parameters' rates; None for a tensor of zeros, which has any rate.
        parameters: Indices of the parameters that it depends on.
        weights: Those of which it is a view or a sum, without the network's input.
        varies: Whether it depends on the network's input.
        floating: Whether it has a rate: integers and booleans only choose.
    """

    rate: Form | None
    parameters: frozenset[int] = frozenset()
    weights: frozenset[int] = frozenset()
    varies: bool = False
    floating: bool = True


@dataclass(frozen=True)
class Equation:
    """A form that must be 0 for what the message says to be possible."""

    form: Form
    message: str


@dataclass
class System:
    """The equations of one network.

    Attributes:
        size: Number of parameters.
        equations: In the order of the network's operations.
        factors: Indices of parameters that multiply something, not only shift it.
        normalizing: Of parameters upstream of a normalisation, and of its scale and shift.
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
        """Let a form be 0."""
        if form is not None and form.any():
            self.equations.append(Equation(form, message))

    def equal(self, values: Sequence[Value], message: str) -> Form | None:
        """The one rate that all values have; zeros have it too."""
        forms = [value.rate for value in values if value.rate is not None]
        for form in forms[1:]:
            self.require(forms[0] - form, message)
        return forms[0] if forms else None

    def product(self, values: Iterable[Value]) -> Form | None:
        """The sum of the rates of values that are multiplied."""
        rate: Form | None = self.constant()
        for value in values:
            self.factors |= value.weights
            rate = None if rate is None or value.rate is None else rate + value.rate
        return rate
