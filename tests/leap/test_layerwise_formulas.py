"""Every method against an implementation read off the formula: float64, explicit inverses, loops over rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from leap.layerwise import METHODS, InputStatistics, Target, reconstruct, reconstruct_admm
from leap.layerwise.selection import row_counts

ROWS, COLUMNS, TOKENS = 7, 24, 60
TARGETS = {
    "row": Target(0.55),
    "layer": Target(0.55, scope="layer"),
    "2:4": Target.n_m(2, 4),
    "1:3": Target.n_m(1, 3),
}


class Problem:
    """A random weight and correlated inputs, in float64."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.w = rng.standard_normal((ROWS, COLUMNS))
        mix = np.eye(COLUMNS) + 0.4 * rng.standard_normal((COLUMNS, COLUMNS))
        self.x = rng.standard_normal((TOKENS, COLUMNS)) * rng.uniform(0.5, 2, COLUMNS) @ mix
        self.gram = self.x.T @ self.x
        self.norm = np.linalg.norm(self.x, axis=0)
        self.weight = torch.tensor(self.w)
        self.stats = InputStatistics(COLUMNS, "gram", torch.float64)
        self.stats.update(torch.tensor(self.x))


@pytest.fixture(params=[0, 1])
def problem(request):
    return Problem(request.param)


@pytest.fixture(params=TARGETS)
def target(request):
    return TARGETS[request.param]


def check(result, mask, weight, score):
    np.testing.assert_array_equal(result.mask.numpy(), mask)
    np.testing.assert_allclose(result.weight.numpy(), weight, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(result.score.numpy(), score, rtol=1e-5)


def smallest_pruned(score: np.ndarray, count: int) -> np.ndarray:
    mask = np.ones(score.size, bool)
    mask[np.argsort(score, axis=None, kind="stable")[:count]] = False
    return mask.reshape(score.shape)


def naive_mask(score: np.ndarray, target: Target) -> np.ndarray:
    if target.pattern:
        n, m = target.pattern
        starts = range(0, score.shape[1], m)
        return np.hstack([[smallest_pruned(row, m - n) for row in score[:, i : i + m]] for i in starts])
    if target.scope == "layer":
        return smallest_pruned(score, round(target.sparsity * score.size))
    counts = row_counts(target.sparsity, *score.shape)
    return np.array([smallest_pruned(row, count) for row, count in zip(score, counts, strict=True)])


def damped(matrix: np.ndarray, damping: float) -> np.ndarray:
    return matrix + damping * np.mean(np.diag(matrix)) * np.eye(len(matrix))


def test_magnitude(problem, target):
    score = np.abs(problem.w)
    result = METHODS["magnitude"](problem.weight, None, target)
    check(result, naive_mask(score, target), problem.w, score)
    assert result.weight is problem.weight


def test_wanda(problem, target):
    score = np.abs(problem.w) * problem.norm
    result = METHODS["wanda"](problem.weight, problem.stats, target)
    check(result, naive_mask(score, target), problem.w, score)
    assert result.weight is problem.weight


@pytest.mark.parametrize("block", [10, 12, 128])
def test_sparsegpt(problem, target, block):
    result = METHODS["sparsegpt"](problem.weight, problem.stats, target, block_size=block, precision="float64")

    group = target.pattern[1] if target.pattern else 1
    block = max(group, block // group * group)
    u = np.linalg.cholesky(np.linalg.inv(damped(2 * problem.gram / TOKENS, 0.01))).T
    w, mask, score = problem.w.copy(), np.ones((ROWS, COLUMNS), bool), np.zeros((ROWS, COLUMNS))

    def count_to(column):
        return round(target.sparsity * (ROWS * column))

    def counts_to(column):
        return [round(count / COLUMNS * column) for count in row_counts(target.sparsity, ROWS, COLUMNS)]

    for j in range(COLUMNS):
        if target.pattern and j % group == 0:
            now = slice(j, j + group)
            score[:, now] = w[:, now] ** 2 / np.diag(u)[now] ** 2
            mask[:, now] = naive_mask(score[:, now], target)
        elif not target.pattern and j % block == 0:
            stop = min(j + block, COLUMNS)
            now = slice(j, stop)
            score[:, now] = w[:, now] ** 2 / np.diag(u)[now] ** 2
            if target.scope == "layer":
                mask[:, now] = smallest_pruned(score[:, now], count_to(stop) - count_to(j))
            else:
                now_and_before = zip(score[:, now], counts_to(stop), counts_to(j), strict=True)
                mask[:, now] = [smallest_pruned(row, after - before) for row, after, before in now_and_before]
        for i in range(ROWS):
            if not mask[i, j]:
                w[i, j:] -= w[i, j] / u[j, j] * u[j, j:]
                w[i, j] = 0
    check(result, mask, w, score)


@pytest.mark.parametrize("block", [10, 12, 128])
def test_thanos(problem, target, block):
    result = METHODS["thanos"](problem.weight, problem.stats, target, block_size=block, precision="float64")

    group = target.pattern[1] if target.pattern else 1
    block = max(group, block // group * group)
    h = damped(2 * problem.gram / TOKENS, 0.01)
    w, mask, score = problem.w.copy(), np.ones((ROWS, COLUMNS), bool), np.zeros((ROWS, COLUMNS))
    layer_budget = round(target.sparsity * w.size)
    row_budgets = row_counts(target.sparsity, ROWS, COLUMNS)
    for j in range(0, COLUMNS, block):
        now = slice(j, min(j + block, COLUMNS))
        width = now.stop - j
        left = np.abs(w[:, j:]) * problem.norm[j:]
        score[:, now] = left[:, :width]
        if target.pattern:
            mask[:, now] = naive_mask(left[:, :width], target)
        elif target.scope == "layer":
            mask[:, now] = smallest_pruned(left, layer_budget)[:, :width]
            layer_budget -= (~mask[:, now]).sum()
        else:
            for i in range(ROWS):
                mask[i, now] = smallest_pruned(left[i], row_budgets[i])[:width]
                row_budgets[i] -= (~mask[i, now]).sum()
        inverse = np.linalg.inv(h[j:, j:])
        for i in range(ROWS):
            q = np.flatnonzero(~mask[i, now])
            w[i, j:] -= np.linalg.solve(inverse[np.ix_(q, q)], w[i, j + q]) @ inverse[q]
            w[i, j + q] = 0
    check(result, mask, w, score)


def gradual_mask(score: np.ndarray, target: Target, share: float) -> np.ndarray:
    """Of N:M groups the best are spared, and the smallest of the others in the layer go."""
    if not target.pattern:
        return naive_mask(score, Target(target.sparsity * share, target.scope))
    spared = naive_mask(score, target)
    return smallest_pruned(np.where(spared, np.inf, score), round(target.sparsity * share * score.size))


@pytest.mark.parametrize("schedule", ["native", "constant", "cubic"])
def test_admm(problem, target, schedule):
    gradual = schedule == "cubic" or (schedule == "native" and target.pattern is not None)
    result = METHODS["admm"](problem.weight, problem.stats, target, schedule=schedule, precision="float64")

    n = np.sqrt(np.diag(problem.gram))
    a = damped(problem.gram / np.outer(n, n), 0.1)
    v = (problem.w * n).T
    b = a @ v
    u = np.zeros_like(v)
    for t in range(20):
        if t < 15:
            score = np.abs(v + u).T
            mask = gradual_mask(score, target, 1 - (1 - (t + 1) / 15) ** 3 if gradual else 1)
        z = (v + u) * mask.T
        u = u + v - z
        v = np.linalg.solve(a + np.eye(COLUMNS), b + (z - u))
    check(result, mask, ((v + u) * mask.T).T / n, score)


@pytest.mark.parametrize("first_rho", [0.1, 300.0])
def test_alps(problem, target, first_rho):
    result = METHODS["alps"](
        problem.weight,
        problem.stats,
        target,
        rho=first_rho,
        cg_iterations=500,
        cg_tolerance=1e-13,
        precision="float64",
    )

    h = damped(problem.gram, 0.01)
    n = np.sqrt(np.diag(h))
    a = h / np.outer(n, n)
    w = (problem.w * n).T
    before = naive_mask(np.abs(w).T, target)
    start = w * before.T
    d, v, rho, moved, restarts = start, np.zeros_like(w), first_rho, False, 0
    for t in range(1, 301):
        b = np.linalg.solve(a + rho * np.eye(COLUMNS), a @ w - v + rho * d)
        mask = naive_mask(np.abs(b + v / rho).T, target)
        d = (b + v / rho) * mask.T
        v = v + rho * (b - d)
        if t % 3:
            continue
        flips = (mask != before).sum()
        before = mask
        if flips / mask.sum() > 0.005:
            moved = True
            rho *= 1.3 if flips / mask.sum() > 0.1 else 1.2
        elif moved and not flips:
            break
        elif moved:
            rho *= 1.1
        else:
            rho /= 5
            if flips:
                d, v, restarts = start, np.zeros_like(w), restarts + 1
        if t > 30 and flips / mask.sum() < 0.0003:
            break
    assert 6 <= t < 300
    assert first_rho == 0.1 or rho < 300, "too large a first penalty is mended"
    score = np.abs(b).T
    mask = naive_mask(score, target)
    check(result, mask, least_squares(w.T, mask, a) / n, score)


def least_squares(w: np.ndarray, mask: np.ndarray, h: np.ndarray) -> np.ndarray:
    """min rᵀHr with r = −w on the pruned weights, row by row, by elimination."""
    new = np.zeros_like(w)
    for i, keep in enumerate(mask):
        r = np.where(keep, 0, -w[i])
        r[keep] = np.linalg.solve(h[np.ix_(keep, keep)], -h[np.ix_(keep, ~keep)] @ r[~keep])
        new[i] = w[i] + r
    return new * mask


def test_optima(problem, target):
    result = METHODS["optima"](
        problem.weight, problem.stats, target, iterations=500, tolerance=1e-13, precision="float64"
    )
    score = np.abs(problem.w) * problem.norm
    mask = naive_mask(score, target)
    check(result, mask, least_squares(problem.w, mask, damped(problem.gram, 0.01)), score)


def test_reconstruct_solves_rows_of_any_count_of_kept_weights(problem):
    mask = np.random.default_rng(5).random((ROWS, COLUMNS)) < np.linspace(0, 1, ROWS)[:, None]
    arguments = (problem.weight, torch.tensor(mask), torch.tensor(problem.gram))
    assert not mask[0].any()
    assert mask[-1].all()

    new = reconstruct(*arguments, damping=0.02, iterations=500, tolerance=1e-13, precision="float64")
    best = least_squares(problem.w, mask, damped(problem.gram, 0.02))
    np.testing.assert_allclose(new.numpy(), best, rtol=1e-8, atol=1e-9)

    n = np.sqrt(np.diag(problem.gram))
    best = least_squares(problem.w * n, mask, damped(problem.gram / np.outer(n, n), 0.1)) / n
    new = reconstruct_admm(*arguments, iterations=3000, precision="float64")
    np.testing.assert_allclose(new.numpy(), best, rtol=1e-6, atol=1e-7)


def test_reconstruct_admm_is_admm_with_the_mask_given(problem):
    mask = METHODS["wanda"](problem.weight, problem.stats, Target(0.5)).mask
    new = reconstruct_admm(problem.weight, mask, problem.stats.gram, iterations=2, precision="float64").numpy()

    n = np.sqrt(np.diag(problem.gram))
    a = damped(problem.gram / np.outer(n, n), 0.1)
    v, u, keep = (problem.w * n).T, np.zeros((COLUMNS, ROWS)), mask.numpy().T
    b = a @ v
    for _ in range(2):
        z = (v + u) * keep
        u = u + v - z
        v = np.linalg.solve(a + np.eye(COLUMNS), b + (z - u))
    np.testing.assert_allclose(new, ((v + u) * keep).T / n, rtol=1e-9, atol=1e-12)


def test_reconstruct_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weight \[2, 3\]"):
        reconstruct(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.eye(4))


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.changes_weights])
def test_float32_is_close_to_float64(problem, method, target):
    exact = METHODS[method](problem.weight, problem.stats, target, precision="float64")
    single = InputStatistics(COLUMNS, "gram")
    single.update(torch.tensor(problem.x))
    result = METHODS[method](problem.weight.float(), single, target)
    assert torch.equal(result.mask, exact.mask)
    torch.testing.assert_close(result.weight, exact.weight.float(), rtol=1e-2, atol=1e-3)
