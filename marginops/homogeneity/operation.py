"""One operation of a traced network, as the rules see it."""

import math
from typing import Any

from .system import Form, NotQuasiHomogeneousError, System, Value


class Operation:
    """One call in the traced network, with what is known of its operands."""

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
        """The operands of these arguments in order, numbers and lists among them."""
        found: list[Value] = []
        for name in names or self.arguments:
            argument = self.arguments.get(name)
            for item in argument if isinstance(argument, (list, tuple)) else [argument]:
                if isinstance(item, Value):
                    found.append(item)
                elif names and isinstance(item, (int, float)):
                    # Zero and infinity stay what they are at any scale.
                    anything = item == 0 or math.isinf(item)
                    found.append(Value(None if anything else self.system.constant()))
        return found

    def first(self) -> Value:
        """The first operand that is a tensor."""
        return self.values()[0]

    def number(self, name: str) -> float:
        """A number, which must not be a tensor."""
        value = self.arguments[name]
        if not isinstance(value, (int, float)):
            raise self.error(f"needs a number for {name}")
        return value

    def equal(self, *values: Value | Form | None) -> Form | None:
        """The rate of a sum of these values, or of values with these rates."""
        terms = [value if isinstance(value, Value) else Value(value) for value in values]
        return self.system.equal(terms, f"{self.place}: its terms cannot have the same rate")

    def zero(self, value: Value, reason: str) -> None:
        """Let a value have rate 0."""
        self.system.require(value.rate, f"{self.place}: {reason}")

    def error(self, reason: str) -> NotQuasiHomogeneousError:
        """An error that says where."""
        return NotQuasiHomogeneousError(f"rates: {self.place} {reason}")
