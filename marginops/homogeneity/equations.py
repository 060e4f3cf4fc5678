"""The equations between the rates of the parameters of a network, and what adds them.

The rate of a value in the network is a linear form in the rates of the parameters. The form is the
array of its coefficients.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Operation:
    """One call of an operation in the traced network, for the rules.

    Attributes:
        name: The name of the ATen operation.
        arguments: The arguments by name. Tensors are replaced by their :class:`Value`.
        system: The equations of the network.
        place: The operation and its module, for messages.
        sizes: The shapes of the tensors among the arguments.
    """

    name: str
    arguments: dict[str, Any]
    system: System
    place: str
    sizes: dict[str, tuple[int, ...]]

    def values(self, *names: str) -> list[Value]:
        """The values of the named arguments (by default all), in order.

        Lists are flattened. Numbers count only in named arguments.
        """
        found: list[Value] = []
        for name in names or self.arguments:
            argument = self.arguments.get(name)
            for item in argument if isinstance(argument, (list, tuple)) else [argument]:
                if isinstance(item, Value):
                    found.append(item)
                elif names and isinstance(item, (int, float)):
                    # Zero and infinity have every rate, because scaling does not change them.
                    has_every_rate = item == 0 or math.isinf(item)
                    found.append(Value(None if has_every_rate else self.system.constant()))
        return found

    def first(self) -> Value:
        """The first operand that is a tensor."""
        return self.values()[0]

    def number(self, name: str) -> float:
        """The value of an argument that has to be a number, not a tensor."""
        value = self.arguments[name]
        if not isinstance(value, (int, float)):
            raise self.error(f"needs a number for {name}")
        return value

    def equal(self, *values: Value | Form | None) -> Form | None:
        """Require that values or rates are equal, and return their rate."""
        terms = [value if isinstance(value, Value) else Value(value) for value in values]
        return self.system.equal(terms, f"{self.place}: its terms cannot have the same rate")

    def zero(self, value: Value, reason: str) -> None:
        """Require that a value has rate 0."""
        self.system.require(value.rate, f"{self.place}: {reason}")

    def error(self, reason: str) -> NotQuasiHomogeneousError:
        """An error that names the operation and its module."""
        return NotQuasiHomogeneousError(f"rates: {self.place} {reason}")
