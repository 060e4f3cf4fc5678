"""The most even non-negative solution of a system of linear equations."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .system import Form

_OPTIONS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
_NOISE = 1e-9


class Infeasible(RuntimeError):
    """The equations have no solution."""


class Program:
    """Non-negative rates that satisfy equations, and what is known of them so far.

    Args:
        matrix: ``[M, P]``, forms that are 0.
        output: ``[P]``, the form that is 1.
    """

    def __init__(self, matrix: NDArray[np.float64], output: Form) -> None:
        self.matrix = matrix
        self.output = output
        self.lower = np.zeros(len(output))
        self.upper = np.full(len(output), np.inf)
        self.bounds_on_sums: list[tuple[Form, float]] = []

    def minimize(self, objective: Form, even: Sequence[int] = ()) -> Any:
        """SciPy's result; with ``even`` of one more variable, an upper bound of these rates.

        Raises:
            Infeasible: There is no solution.
        """
        from scipy.optimize import linprog

        size, extra = len(self.output), int(len(even) > 0)
        wide = (0, extra)
        rows = [np.pad(form, wide) for form, _ in self.bounds_on_sums]
        limits = [limit for _, limit in self.bounds_on_sums]
        for index in even:
            row = np.zeros(size + 1)
            row[index], row[size] = 1, -1
            rows.append(row)
            limits.append(0.0)
        result = linprog(
            np.pad(objective, wide, constant_values=1) if extra else objective,
            A_ub=np.stack(rows) if rows else None,
            b_ub=limits or None,
            A_eq=np.pad(np.vstack([self.matrix, self.output]), ((0, 0), wide)),
            b_eq=np.append(np.zeros(len(self.matrix)), 1.0),
            bounds=np.column_stack(
                [np.pad(self.lower, wide), np.pad(self.upper, wide, constant_values=np.inf)]
            ),
            options=_OPTIONS,
        )
        if result.status == 2:
            raise Infeasible
        if result.status != 0:
            raise RuntimeError(f"rates: the linear program was not solved: {result.message}")
        return result

    def is_feasible(self) -> bool:
        """Whether there is a solution."""
        try:
            self.minimize(np.zeros(len(self.output)))
        except Infeasible:
            return False
        return True

    def minimize_sum(self, indices: Sequence[int]) -> None:
        """Keep only solutions in which the sum of these rates is the smallest possible."""
        if len(indices) == 0:
            return
        form = np.zeros(len(self.output))
        form[list(indices)] = 1
        smallest = clean(self.minimize(form).fun)
        if smallest == 0:
            self.upper[list(indices)] = 0
        else:
            self.bounds_on_sums.append((form, smallest))

    def level(self, indices: Sequence[int]) -> None:
        """Fix these rates: the largest as small as possible, then the next largest, and so on."""
        left = [index for index in indices if self.upper[index] > 0]
        while left:
            result = self.minimize(np.zeros(len(self.output)), left)
            largest = clean(result.x[-1])
            # Where the dual variable is positive the bound is attained in every optimal solution.
            pressure = -result.ineqlin.marginals[-len(left) :]
            fixed = [i for i, force in zip(left, pressure, strict=True) if force > 1e-7]
            if largest == 0:
                fixed = left
            for index in fixed:
                self.lower[index] = self.upper[index] = largest
            left = [index for index in left if index not in set(fixed)]

    def follow(self, indices: Sequence[int]) -> None:
        """Fix the remaining rates: as the equations say, else as :meth:`level` does."""
        matrix = np.vstack([self.matrix, self.output])
        left = [i for i in indices if self.upper[i] > 0 and matrix[:, i].any()]
        if np.linalg.matrix_rank(matrix[:, left]) < len(left):
            return self.level(left)
        constant = np.append(np.zeros(len(self.matrix)), 1.0) - matrix @ self.lower
        for index, value in zip(left, np.linalg.lstsq(matrix[:, left], constant)[0], strict=True):
            self.lower[index] = self.upper[index] = clean(value)


def clean(value: float) -> float:
    """Without the solver's noise: rates are mostly fractions of small numbers."""
    near = Fraction(value).limit_denominator(1000)
    return float(near) if abs(near - Fraction(value)) < _NOISE else value
