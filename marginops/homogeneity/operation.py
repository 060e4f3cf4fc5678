"""One operation of a traced network, for the rules."""

import math
from typing import Any

from .system import Form, NotQuasiHomogeneousError, System, Value


class Operation:
    """One call of an operation in the traced network.

    Args:
        name: The name of the ATen operation.
        arguments: The arguments by name. Tensors are replaced by their :class:`Value`.
        system: The equations of the network.
        place: The operation and its module, for messages.
        sizes: The shapes of the tensors among the arguments.
    """

    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        system: System,
        place: str,
        sizes: dict[str, tuple[int, ...]],
    ) -> None:
        self.name = name
        self.arguments = arguments
        self.system = system
        self.place = place
        self.sizes = sizes

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
