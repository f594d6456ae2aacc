import itertools

import pytest
import torch
from conv_twins import dense, distance
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import polar
from stiefel.linalg.block_conv import block_kernel, block_plan
from stiefel.nn import conv_orth_case, lorth, orthogonal_conv_exists
from stiefel.nn.orthogonal_conv import start_factors


def least_found(loss, kernel, tries=3):
    """Smallest value that L-BFGS finds from random starts."""
    found = []
    for seed in range(tries):
        x = torch.randn(kernel, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x = (x / x.norm()).requires_grad_()
        optimizer = torch.optim.LBFGS([x], max_iter=300, line_search_fn="strong_wolfe")

        def closure(x=x, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(x)
            value.backward()
            return value.detach()

        optimizer.step(closure)
        found.append(float(loss(x.detach())))
    return min(found)


@pytest.mark.parametrize(
    ("numbers", "case"),
    [
        ((4, 3, 3, 1), "CO"), ((3, 4, 3, 1), "RO"), ((8, 2, 3, 2), "square"), ((9, 2, 3, 2), "CO"),
        ((5, 3, 5, 2), "RO"), ((16, 1, 3, 1), "CO"), ((6, 2, 5, 3), "RO"), ((4, 4, 3, 1), "square"),
    ],
)  # fmt: skip
def test_cases(numbers, case):
    assert conv_orth_case(*numbers) == case
    report = orthogonal_conv_exists(*numbers)
    assert report
    assert (report.case, report.minimum, report.reduced_kernel) == (case, 0.0, None)


@pytest.mark.parametrize(
    ("numbers", "least", "inequality"),
    [
        ((10, 1, 3, 4), 1.0, "M ≤ C"),
        ((2, 1, 1, 2), 1.0, "M ≤ C"),
        ((17, 1, 3, 4), 7.0, "S ≤ k"),
        ((5, 1, 1, 2), 3.0, "S ≤ k"),
    ],
)
def test_smallest_penalty_where_nothing_exists(numbers, least, inequality):
    report = orthogonal_conv_exists(*numbers)
    assert not report
    assert report.minimum == least
    assert inequality in report.reason
    m, c, k, s = numbers
    assert least_found(lambda x: lorth(x, s), (m, c, k, k)) == pytest.approx(least, abs=1e-6)


def test_mixed_axes():
    # Axis 2 is read in part only: 1 · 1 · 2 inputs a patch instead of 1 · 2 · 3.
    report = orthogonal_conv_exists(5, 1, (3, 2), (1, 3))
    assert not report
    assert report.minimum == 5 - 2 - (5 - 3)
    found = least_found(lambda x: lorth(x, (1, 3)), (5, 1, 3, 2))
    assert found == pytest.approx(report.minimum, abs=1e-6)
    assert orthogonal_conv_exists(2, 1, (3, 2), (1, 3))


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 9),
    c=st.integers(1, 4),
    axes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=2),
)
def test_an_orthogonal_kernel_is_built_exactly_where_one_exists(m, c, axes):
    k, s = tuple(a for a, _ in axes), tuple(b for _, b in axes)
    report = orthogonal_conv_exists(m, c, k, s, dim=len(axes))
    if not report:
        with pytest.raises(ValueError, match="smallest L_orth"):
            block_plan(m, c, k, s)
        assert report.minimum > 0
        return
    plan = block_plan(m, c, k, s)
    kernel = block_kernel(plan, *start_factors(plan, 1, torch.Generator().manual_seed(m)))[0]
    assert kernel.shape == (m, c, *k)
    assert float(lorth(kernel, s)) < 1e-24
    assert report.minimum == 0


@pytest.mark.parametrize("numbers", [(2, 3, 3, 1), (3, 2, 4, 2), (4, 2, 3, 2), (3, 3, 2, 1)])
def test_rows_survive_without_padding(numbers):
    m, c, k, s = numbers
    assert orthogonal_conv_exists(*numbers, "valid", dim=1)
    plan = block_plan(m, c, (k,), (s,))
    kernel = block_kernel(plan, *start_factors(plan, 1, torch.Generator().manual_seed(1)))[0]
    matrix = dense(kernel, (k + 5 * s,), s, "valid")
    off = matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)
    assert off.abs().max() < 1e-14


def test_columns_without_padding():
    assert orthogonal_conv_exists(9, 2, 2, 2, "valid")
    assert not orthogonal_conv_exists(9, 2, 3, 2, "valid")
    report = orthogonal_conv_exists(3, 1, 3, 1, "valid", dim=1)
    assert not report
    assert "k = S" in report.reason

    def loss(x):
        rows = torch.zeros(3, 6, 8, dtype=torch.float64)
        for i in range(6):
            rows[:, i, i : i + 3] += x[:, 0]
        matrix = rows.reshape(18, 8)
        return (matrix.T @ matrix - torch.eye(8, dtype=torch.float64)).square().sum()

    assert least_found(loss, (3, 1, 3)) > 0.1
    # Circular, the same numbers have a solution.
    assert least_found(lambda x: lorth(x), (3, 1, 3)) < 1e-10


@pytest.mark.parametrize(("m", "c", "k", "s"), [(2, 3, 3, 1), (4, 2, 3, 1), (3, 2, 3, 2)])
def test_a_border_of_zeros_leaves_a_block(m, c, k, s, generator):
    report = orthogonal_conv_exists(m, c, k, s, "zeros_same", dim=1)
    assert not report
    block = min((k + 1) // 2, s)
    assert report.reduced_kernel == (block,)
    inside = torch.zeros(k, dtype=torch.float64)
    inside[(k - 1) // 2 :][:block] = 1

    # An orthonormal matrix in the block, nothing outside: orthogonal.
    matrix = torch.randn(m, c * block, dtype=torch.float64, generator=generator)
    kernel = torch.zeros(m, c, k, dtype=torch.float64)
    kernel[..., inside.bool()] = polar(matrix).reshape(m, c, block)
    assert distance(dense(kernel, (5 * s,), s, "zeros"))[0] < 1e-13

    def loss(x):
        # Something outside, of norm 0.3; the operator from torch's own action on unit vectors.
        outside = x * (1 - inside)
        x = x * inside + 0.3 * outside / outside.norm()
        image = torch.eye(c * 4 * s, dtype=torch.float64).reshape(-1, c, 4 * s)
        matrix = torch.nn.functional.conv1d(image, x, stride=s, padding=(k - 1) // 2).flatten(1)
        gram = matrix.T @ matrix if m <= c * s else matrix @ matrix.T
        return (gram - torch.eye(len(gram), dtype=torch.float64)).square().sum()

    assert least_found(loss, (m, c, k)) > 1e-3


def test_one_tap_and_too_small_blocks():
    assert orthogonal_conv_exists(4, 4, 1, 1, "zeros_same")
    assert orthogonal_conv_exists(4, 4, 3, 1, "zeros_same").reduced_kernel == (1, 1)
    # k = 3, S = 3: two of three pixels are left, too few for columns.
    report = orthogonal_conv_exists(9, 1, 3, 3, "zeros_same")
    assert (report.exists, report.reduced_kernel) == (False, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 3), "out_ch must be at least 1, got 0"),
        ((1, -1, 3), "in_ch must be at least 1, got -1"),
        ((1, 1, 0), "kernel_size must be at least 1, got 0"),
        ((1, 1, 3, 0), "stride must be at least 1, got 0"),
        ((1, 1, (3, 3, 3)), "kernel_size must be one integer or 2"),
        ((1, 1, 3, 1, "reflect"), "padding_mode must be one of circular, valid, zeros_same"),
        ((1, 1, 4, 1, "zeros_same"), "odd kernel sizes"),
        ((1, 1, 3, 1, "circular", 3), "dim must be 1 or 2, got 3"),
    ],
)
def test_numbers_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        orthogonal_conv_exists(*arguments)


def test_numbers_that_are_none():
    with pytest.raises(TypeError):
        orthogonal_conv_exists(1, 1, 3, 1.5)


def test_the_papers_theorem_over_a_grid():
    for m, c, k, s in itertools.product(range(1, 12), range(1, 4), (1, 3, 5), (1, 2, 4)):
        case = conv_orth_case(m, c, k, s)
        expected = m <= c * k**2 if case == "RO" else s <= k
        if case == "square":
            expected = s <= k and m <= c * k**2
        assert bool(orthogonal_conv_exists(m, c, k, s)) == expected
