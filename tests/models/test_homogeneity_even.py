"""The most even solution is unique and matches an enumeration of all vertices."""

import itertools

import numpy as np
import pytest

from marginops.homogeneity.linear_program import Infeasible, LinearProgram, clean


def vertices(matrix, output):
    """All vertices of the cells of the set of solutions; in a cell, rates keep their order.

    Within a cell the sorted rates are linear, so the most even solution is one of the vertices.
    """
    size = len(output)
    planes = [np.eye(size)[i] for i in range(size)]
    planes += [np.eye(size)[i] - np.eye(size)[j] for i in range(size) for j in range(i)]
    equations = np.vstack([matrix, output])
    constant = np.append(np.zeros(len(matrix)), 1.0)
    missing = size - np.linalg.matrix_rank(equations)
    for chosen in itertools.combinations(planes, missing):
        system = np.vstack([equations, *chosen])
        if np.linalg.matrix_rank(system) < size:
            continue
        right = np.append(constant, np.zeros(missing))
        solution = np.linalg.lstsq(system, right, rcond=None)[0]
        if np.allclose(system @ solution, right, atol=1e-9) and solution.min() > -1e-9:
            yield solution


def most_even(matrix, output):
    """All vertices that are most even, or None if there is no solution."""
    found = list(vertices(matrix, output))
    if not found:
        return None
    ordered = [tuple(np.round(np.sort(solution)[::-1], 7)) for solution in found]
    return [s for s, key in zip(found, ordered, strict=True) if key == min(ordered)]


def solved(matrix, output):
    program = LinearProgram(matrix, output)
    if not program.is_feasible():
        return None
    program.level(range(len(output)))
    assert (program.lower == program.upper).all()
    return program.lower


@pytest.mark.parametrize("seed", range(3))
def test_level_agrees_with_brute_force(seed):
    random = np.random.default_rng(seed)
    feasible = 0
    for _ in range(25):
        size, count = int(random.integers(2, 6)), int(random.integers(0, 3))
        matrix = random.integers(-1, 2, (count, size)).astype(float)
        output = random.integers(0, 3, size).astype(float)
        expected, found = most_even(matrix, output), solved(matrix, output)
        assert (expected is None) == (found is None)
        if expected is not None:
            feasible += 1
            # All of them are the same point, since the most even solution is unique.
            for solution in expected:
                np.testing.assert_allclose(found, solution, atol=1e-9)
    assert feasible > 10


def test_permuted_parameters_have_permuted_rates():
    random = np.random.default_rng(7)
    matrix = np.array([[1.0, 1, 1, -1, 0, 0, 0], [0, 0, 0, 0, 2, -1, 0]])
    output = np.array([0.0, 0, 0, 1, 1, 1, 0])
    found = solved(matrix, output)
    for _ in range(5):
        order = random.permutation(7)
        assert (solved(matrix[:, order], output[order]) == found[order]).all()


def test_minimizing_a_sum_comes_before_levelling():
    # x0 + x1 + x2 = 1: first the sum x1 + x2 is minimized, then the rates are levelled.
    program = LinearProgram(np.zeros((0, 3)), np.ones(3))
    program.minimize_sum([1, 2])
    program.level([0, 1, 2])
    assert program.lower.tolist() == [1.0, 0.0, 0.0]
    program = LinearProgram(np.array([[1.0, -1.0, 0.0, 1.0]]), np.array([0.0, 1.0, 1.0, 0.0]))
    program.minimize_sum([1, 2])
    program.level([0, 1, 2, 3])
    # x1 + x2 = 1 cannot be less; x1 = x0 + x3.
    np.testing.assert_allclose(program.lower, [0.25, 0.5, 0.5, 0.25])
    program = LinearProgram(np.zeros((0, 2)), np.array([2.0, 1.0]))
    program.minimize_sum([0, 1])
    program.level([0, 1])
    # It is not 1/3 each, because that sum is larger.
    assert program.lower.tolist() == [0.5, 0.0]


def test_following_rates_gives_the_result_of_levelling():
    matrix = np.array([[1.0, 0, -1, 0, 0], [1, 1, 0, -1, 0]])
    output = np.array([1.0, 1, 0, 0, 0])
    one, other = LinearProgram(matrix, output), LinearProgram(matrix, output)
    for program in (one, other):
        program.level([0, 1])
    one.follow([2, 3, 4])
    other.level([2, 3, 4])
    assert one.lower.tolist() == other.lower.tolist() == [0.5, 0.5, 0.5, 1.0, 0.0]
    # Rates that do not follow from the others are levelled: x2 + 2 x3 = 1.
    free = LinearProgram(np.array([[1.0, 1.0, -1.0, -2.0]]), np.array([1.0, 1.0, 0.0, 0.0]))
    free.level([0, 1])
    free.follow([2, 3])
    np.testing.assert_allclose(free.lower, [0.5, 0.5, 1 / 3, 1 / 3])


def test_no_solution_is_an_error():
    program = LinearProgram(np.array([[1.0, 0.0]]), np.array([1.0, 0.0]))
    assert not program.is_feasible()
    with pytest.raises(Infeasible):
        program.minimize(np.ones(2))


def test_noise_is_removed_and_nothing_else():
    assert clean(1 / 3 + 3e-13) == 1 / 3
    assert clean(1.0 - 1e-12) == 1.0
    assert clean(-1e-15) == 0.0
    assert clean(0.123456789) == 0.123456789
