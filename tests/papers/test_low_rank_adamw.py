import pytest
import torch

from stiefel.optim import DCTAdamW
from stiefel.papers.low_rank_adamw import LowRankAdamW

SHAPES = [(6, 10), (10, 6), (6, 6), (6, 10)]


def problem(generator, dtype=torch.float64):
    """Matrices with a gradient for each of a few steps, and a vector."""
    weights = [torch.randn(s, generator=generator, dtype=dtype) for s in [*SHAPES, (5,)]]
    gradients = [[torch.randn(w.shape, generator=generator, dtype=dtype) for w in weights]] * 2
    gradients += [[torch.randn(w.shape, generator=generator, dtype=dtype) for w in weights]] * 2
    return weights, gradients


def run(make, weights, gradients):
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    groups = [
        {"params": params[:-1], "rule": "matrix"},
        {"params": params[-1:], "rule": "elementwise"},
    ]
    optimizer = make(groups)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, step, strict=True))
    return [p.detach() for p in params], optimizer


@pytest.mark.parametrize("feedback", [True, False])
def test_with_dct_columns_it_is_the_library_s_optimizer(generator, feedback):
    weights, gradients = problem(generator)
    common = {"lr": 0.1, "rank": 3, "betas": (0.8, 0.9), "weight_decay": 0.1, "adamw_lr": 0.2}
    expected, _ = run(
        lambda g: DCTAdamW(g, error_feedback="full" if feedback else None, **common),
        weights,
        gradients,
    )
    got, _ = run(
        lambda g: LowRankAdamW(g, subspace="dct", error_feedback=feedback, **common),
        weights,
        gradients,
    )
    # The vector: no decay there by default in one, the group's decay in the other.
    for a, b in zip(expected[:-1], got[:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_rest_is_adamw(generator):
    weights, gradients = problem(generator)
    got, _ = run(
        lambda g: LowRankAdamW(
            g, lr=0.1, rank=3, subspace="svd", adamw_lr=0.02, adamw_betas=(0.7, 0.8)
        ),
        weights,
        gradients,
    )
    p = torch.nn.Parameter(weights[-1].clone())
    optimizer = torch.optim.AdamW([p], lr=0.02, betas=(0.7, 0.8), weight_decay=0.0)
    for step in gradients:
        p.grad = step[-1]
        optimizer.step()
    torch.testing.assert_close(got[-1], p.detach())


def test_svd_projector_spans_the_leading_directions_of_the_gradient(generator):
    weights, gradients = problem(generator)
    _, optimizer = run(
        lambda g: LowRankAdamW(g, lr=0.1, rank=3, subspace="svd"), weights, gradients
    )
    for p, g in zip(optimizer.param_groups[0]["params"], gradients[-1], strict=False):
        a = g.mT if g.shape[0] < g.shape[1] else g
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        projector = optimizer.state[p]["projector"]
        best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
        torch.testing.assert_close(a @ projector @ projector.mT, best)


def test_error_feedback_keeps_what_was_not_projected(generator):
    """Projected parts of all steps and the error at the end add up to the gradients."""
    weights, gradients = problem(generator)
    seen = []

    class Watched(LowRankAdamW):
        def _advance(self, group, p, gradient, projector, wide=False):
            if projector is not None and p is self.param_groups[0]["params"][1]:
                seen.append(gradient @ projector.mT)
            super()._advance(group, p, gradient, projector, wide)

    _, optimizer = run(
        lambda g: Watched(g, lr=0.1, rank=2, subspace="random-columns", error_feedback=True),
        weights,
        gradients,
    )
    error = optimizer.state[optimizer.param_groups[0]["params"][1]]["error"]
    torch.testing.assert_close(sum(seen) + error, sum(step[1] for step in gradients))


def test_random_columns_are_new_in_every_step_distinct_and_reproducible(generator):
    weights, gradients = problem(generator)

    def chosen():
        draws = []

        class Watched(LowRankAdamW):
            def _projectors(self, a, rank):
                draws.append(super()._projectors(a, rank))
                return draws[-1]

        run(
            lambda g: Watched(g, lr=0.1, rank=3, subspace="random-columns"),
            weights,
            gradients[:2],
        )
        return draws

    draws, again = chosen(), chosen()
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    half = len(draws) // 2
    assert any(not torch.equal(a, b) for a, b in zip(draws[:half], draws[half:], strict=True))
    for p in draws:
        torch.testing.assert_close(p.mT @ p, torch.eye(3, dtype=p.dtype).expand(len(p), 3, 3))


def test_bad_arguments():
    p = torch.nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"subspace must be one of.*got 'qr'"):
        LowRankAdamW([{"params": [p], "rule": "matrix"}], lr=0.1, rank=2, subspace="qr")
    with pytest.raises(ValueError, match="got 'vector'"):
        LowRankAdamW([{"params": [p], "rule": "vector"}], lr=0.1, rank=2, subspace="svd")
    flat = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"one of shape \(3,\)"):
        LowRankAdamW([{"params": [flat], "rule": "matrix"}], lr=0.1, rank=2, subspace="svd")
    optimizer = LowRankAdamW([{"params": [p], "rule": "matrix"}], lr=0.1, rank=2, subspace="svd")
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(lambda: 0.0)
    p.grad = torch.full((3, 3), torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 3))
