"""The most even non-negative solution of a system of linear equations."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .equations import Form

_OPTIONS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
_NOISE = 1e-9


class Infeasible(RuntimeError):
    """The equations have no solution."""


class LinearProgram:
    """The linear program for the rates, with bounds that become narrower step by step.

    Args:
        matrix: ``[M, P]``, forms that have to be 0.
        output: ``[P]``, the form that has to be 1.
    """

    def __init__(self, matrix: NDArray[np.float64], output: Form) -> None:
        self.matrix = matrix
        self.output = output
        self.lower = np.zeros(len(output))
        self.upper = np.full(len(output), np.inf)
        self.bounds_on_sums: list[tuple[Form, float]] = []

    def minimize(self, objective: Form, even: Sequence[int] = ()) -> Any:
        """Minimize a linear objective.

        Args:
            objective: ``[P]``, the coefficients of the rates.
            even: Indices of rates. If there are any, the program has one more variable. It is an
                upper bound of these rates and is added to the objective.

        Returns:
            The result of ``scipy.optimize.linprog``.

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
            raise RuntimeError(f"rates: SciPy did not solve the linear program: {result.message}")
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
        """Fix these rates, the largest as small as possible, then the next largest, and so on."""
        left = [index for index in indices if self.upper[index] > 0]
        while left:
            result = self.minimize(np.zeros(len(self.output)), left)
            largest = clean(result.x[-1])
            # A rate whose dual variable is positive equals the bound in every optimal solution.
            duals = -result.ineqlin.marginals[-len(left) :]
            fixed = [i for i, dual in zip(left, duals, strict=True) if dual > 1e-7]
            if largest == 0:
                fixed = left
            for index in fixed:
                self.lower[index] = self.upper[index] = largest
            left = [index for index in left if index not in set(fixed)]

    def follow(self, indices: Sequence[int]) -> None:
        """Fix the remaining rates by the equations. If these leave a choice, use :meth:`level`."""
        matrix = np.vstack([self.matrix, self.output])
        left = [i for i in indices if self.upper[i] > 0 and matrix[:, i].any()]
        if np.linalg.matrix_rank(matrix[:, left]) < len(left):
            return self.level(left)
        constant = np.append(np.zeros(len(self.matrix)), 1.0) - matrix @ self.lower
        for index, value in zip(left, np.linalg.lstsq(matrix[:, left], constant)[0], strict=True):
            self.lower[index] = self.upper[index] = clean(value)


def clean(value: float) -> float:
    """Remove the rounding errors of the solver. Most rates are fractions of small numbers."""
    near = Fraction(value).limit_denominator(1000)
    return float(near) if abs(near - Fraction(value)) < _NOISE else value
