"""DCT-AdamW against its equations written out, AdamW as its full-rank case, and its state."""

import io
import itertools
import math

import pytest
import torch
from torch import nn

from stiefel.linalg import dct_matrix, haar
from stiefel.optim.dct_adamw import DCTAdamW, low_rank_adam

METHODS = ("fft", "matmul")
FEEDBACK = (None, "full", 8, 4)
every_method = pytest.mark.parametrize("method", METHODS)
every_feedback = pytest.mark.parametrize("feedback", FEEDBACK, ids=str)
close = {"rtol": 0, "atol": 1e-11}


def noise(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def weights(*shapes, dtype=torch.float64):
    return [nn.Parameter(noise(shape, i, dtype)) for i, shape in enumerate(shapes)]


def gradient_of(shape, step, index=0, dtype=torch.float64):
    return noise(shape, 100 * (step + 1) + index, dtype)


def train(optimizer, steps, start=0):
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(start, start + steps):
        for i, p in enumerate(params):
            p.grad = gradient_of(p.shape, step, i, p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def reference(weight, gradients, *, rank, lr, wd, betas, eps, gap, rotate, feedback, norm, basis):
    """The sheet's listing for R ≥ C, one line a line, rotating by the product of the bases."""
    d = dct_matrix(weight.shape[1], dtype=torch.float64)
    q = d.mT if basis == "dct2" else d
    e = torch.zeros_like(weight)
    m = v = torch.zeros(weight.shape[0], rank, dtype=torch.float64)
    chosen = None
    for t, g in enumerate(gradients, start=1):
        weight = weight * (1 - lr * wd)
        a = g + e if feedback else g
        if t == 1 or t % gap == 0:
            before = chosen
            scores = torch.linalg.vector_norm(a @ q, norm, dim=0)
            chosen = scores.topk(rank).indices.sort().values
            if rotate and t > 1:
                rotation = q[:, before].mT @ q[:, chosen]
                m, v = m @ rotation, (v @ rotation).abs()
        low = a @ q[:, chosen]
        if feedback:
            e = a - low @ q[:, chosen].mT
        m = betas[0] * m + (1 - betas[0]) * low
        v = betas[1] * v + (1 - betas[1]) * low**2
        u = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        weight = weight - lr * u @ q[:, chosen].mT
    return weight, m, v, chosen, e @ q


@every_method
@pytest.mark.parametrize("shape", [(9, 6), (6, 6), (6, 9)], ids=str)
@pytest.mark.parametrize(
    ("gap", "rotate", "feedback", "norm", "basis"),
    [
        (1, True, None, 1, "dct2"),
        (1, True, "full", 2, "dct3"),
        (3, True, None, 1, "dct3"),
        (3, False, "full", 1, "dct2"),
        (1, False, None, 2, "dct2"),
    ],
)
def test_it_is_the_listing_of_the_sheet(method, shape, gap, rotate, feedback, norm, basis):
    parameter = weights(shape)[0]
    start, wide = parameter.detach().clone(), shape[0] < shape[1]
    settings = {"betas": (0.8, 0.9), "eps": 1e-8}
    optimizer = DCTAdamW(
        [parameter],
        0.1,
        2,
        weight_decay=0.3,
        update_gap=gap,
        rotate=rotate,
        error_feedback=feedback,
        norm=norm,
        basis=basis,
        method=method,
        **settings,
    )
    train(optimizer, 7)
    gradients = [gradient_of(shape, t) for t in range(7)]
    weight, m, v, chosen, error = reference(
        start.mT if wide else start,
        [g.mT if wide else g for g in gradients],
        rank=2,
        lr=0.1,
        wd=0.3,
        gap=gap,
        rotate=rotate,
        feedback=feedback,
        norm=norm,
        basis=basis,
        **settings,
    )
    if wide:
        weight, m, v, error = weight.mT, m.mT, v.mT, error.mT
    state = optimizer.state[parameter]
    torch.testing.assert_close(parameter.detach(), weight, **close)
    torch.testing.assert_close(state["low_avg"].view(m.shape), m, **close)
    torch.testing.assert_close(state["low_avg_sq"].view(m.shape), v, **close)
    assert torch.equal(state["columns"], chosen)
    if feedback:
        torch.testing.assert_close(state["error"].view(shape), error, **close)


@pytest.mark.parametrize("shape", [(7, 5), (5, 5), (5, 7)], ids=str)
def test_all_columns_of_the_identity_are_adamw(shape):
    ours, theirs = weights(shape), weights(shape)
    same = {"lr": 0.05, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-6}
    train(DCTAdamW(ours, rank=5, basis=torch.eye, **same), 6)
    train(torch.optim.AdamW(theirs, **same), 6)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-13)


def test_the_pure_function_starts_as_adam():
    a = noise((4, 3), 0)
    zero = torch.zeros_like(a)
    u, m, v = low_rank_adam(zero, zero, a, (0.9, 0.99), 0.0, 1.0)
    torch.testing.assert_close(u, a.sign())
    torch.testing.assert_close(m, 0.1 * a)
    torch.testing.assert_close(v, 0.01 * a**2)
    assert not zero.any()


@every_method
@every_feedback
def test_transposing_the_problem_transposes_every_iterate(method, feedback):
    for shape, sides in (((9, 6), ("auto", "auto")), ((6, 6), ("right", "left"))):
        one, other = weights(shape)[0], nn.Parameter(weights(shape)[0].detach().mT.contiguous())
        settings = {"lr": 0.01, "rank": 2, "error_feedback": feedback, "method": method}
        optimizers = (
            DCTAdamW([one], side=sides[0], **settings),
            DCTAdamW([other], side=sides[1], **settings),
        )
        for t in range(5):
            one.grad = gradient_of(shape, t)
            other.grad = one.grad.mT.contiguous()
            for optimizer in optimizers:
                optimizer.step()
            torch.testing.assert_close(one, other.mT, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)], ids=str)
@every_method
def test_all_columns_leave_no_error(shape, method):
    parameter = weights(shape)[0]
    optimizer = DCTAdamW([parameter], rank=6, error_feedback="full", method=method)
    train(optimizer, 3)
    assert not optimizer.state[parameter]["error"].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(9, 7), (7, 9)], ids=str)
def test_few_bits_keep_the_error_to_half_a_level(bits, shape):
    exact, coarse = weights(shape)[0], weights(shape)[0]
    full = DCTAdamW([exact], rank=2, error_feedback="full")
    few = DCTAdamW([coarse], rank=2, error_feedback=bits)
    train(full, 1)
    train(few, 1)
    torch.testing.assert_close(exact, coarse)
    error, state = full.state[exact]["error"].view(shape), few.state[coarse]
    codes = state["error_codes"]
    if bits == 4:
        codes = torch.stack([codes >> 4, codes & 15], -1).flatten()[:63]
    buckets = (9, 1) if shape == (9, 7) else (1, 9)
    low, unit = state["error_range"].view(2, *buckets)
    back = codes.view(shape) * unit + low
    assert ((back - error).abs() <= 0.5001 * unit).all()
    assert (unit > 0).all()
    train(full, 4, start=1)
    train(few, 4, start=1)
    assert not torch.equal(exact, coarse)
    moved = (exact - weights(shape)[0]).norm()
    assert (exact - coarse).norm() < (0.2 if bits == 8 else 1.0) * moved


def test_error_feedback_gives_back_what_was_left_out():
    """A gradient with two columns, rank one: with feedback both are served in turn."""
    served = {}
    for feedback in FEEDBACK:
        parameter = nn.Parameter(torch.zeros(4, 3))
        optimizer = DCTAdamW(
            [parameter], 0.1, 1, basis=torch.eye, error_feedback=feedback, betas=(0.0, 0.99)
        )
        for _ in range(6):
            parameter.grad = torch.tensor([[2.0, 1.2, 0.0]] * 4)
            optimizer.step()
        served[feedback] = (parameter.abs().sum(0) > 0).tolist()
    assert served[None] == [True, False, False]
    for feedback in FEEDBACK[1:]:
        assert served[feedback] == [True, True, False]


@pytest.mark.parametrize(
    ("betas", "first"), [((0.9, 0.999), 0.1 / 0.001**0.5), ((0.9, 0.95), 0.1 / 0.05**0.5)]
)
def test_the_first_update_of_a_new_column(betas, first):
    sizes = {}
    for correct in (False, True):
        parameter = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        optimizer = DCTAdamW(
            [parameter], 1.0, 1, betas, basis=torch.eye, correct_new_columns=correct, eps=0.0
        )
        for _ in range(30_000 if betas[1] == 0.999 and not correct else 300):
            parameter.grad = torch.tensor([[1.0, 0, 0]] * 4, dtype=torch.float64)
            optimizer.step()
            if betas[1] == 0.999 and not correct:
                optimizer.state[parameter]["step"].fill_(30_000)
                break
        before = parameter.detach().clone()
        parameter.grad = torch.tensor([[0, 1.0, 0]] * 4, dtype=torch.float64)
        optimizer.step()
        sizes[correct] = float((before - parameter.detach())[0, 1])
        if correct:
            assert optimizer.state[parameter]["column_steps"].tolist() == [1]
            optimizer.step()
            assert optimizer.state[parameter]["column_steps"].tolist() == [2]
    assert sizes[False] == pytest.approx(first, rel=1e-4)
    assert sizes[True] == pytest.approx(1.0)


def test_counts_travel_with_their_columns():
    parameter = nn.Parameter(torch.zeros(4, 4))
    optimizer = DCTAdamW([parameter], 0.1, 2, basis=torch.eye, correct_new_columns=True)
    for first, second in ((0, 1), (0, 1), (1, 3), (0, 1)):
        parameter.grad = torch.zeros(4, 4)
        parameter.grad[:, [first, second]] = 1.0
        optimizer.step()
    state = optimizer.state[parameter]
    assert state["columns"].tolist() == [0, 1]
    assert state["column_steps"].tolist() == [1, 4]


def test_correcting_is_the_plain_rule_while_columns_stay():
    one, other = weights((6, 4)), weights((6, 4))
    train(DCTAdamW(one, rank=4), 5)
    train(DCTAdamW(other, rank=4, correct_new_columns=True), 5)
    torch.testing.assert_close(one, other)


def test_columns_are_chosen_at_the_first_step_and_every_gap():
    parameter = weights((30, 12))[0]
    optimizer = DCTAdamW([parameter], rank=3, update_gap=4)
    lists = []
    for t in range(9):
        parameter.grad = gradient_of((30, 12), t)
        optimizer.step()
        lists.append(tuple(optimizer.state[parameter]["columns"].tolist()))
    changed = [a != b for a, b in itertools.pairwise(lists)]
    assert changed == [t % 4 == 0 for t in range(2, 10)]


@every_feedback
def test_parameters_that_pause_keep_their_own_count(feedback):
    shapes = ((6, 4), (6, 4), (4, 6))
    settings = {"lr": 0.01, "rank": 2, "update_gap": 3, "error_feedback": feedback}
    together = DCTAdamW(weights(*shapes), **settings)
    params = together.param_groups[0]["params"]
    alone = [DCTAdamW([p], **settings) for p in weights(*shapes)]
    for t in range(8):
        for i, p in enumerate(params):
            twin = alone[i].param_groups[0]["params"][0]
            if (t + i) % 3:
                p.grad, twin.grad = (gradient_of(p.shape, t, i) for _ in "ab")
                alone[i].step()
            else:
                p.grad = None
        together.step()
    for p, single in zip(params, alone, strict=True):
        twin = single.param_groups[0]["params"][0]
        torch.testing.assert_close(p, twin)
        assert together.state[p]["step"].tolist() == single.state[twin]["step"].tolist()
    assert len({float(together.state[p]["step"]) for p in params}) > 1


@every_feedback
def test_blocks_experts_and_kernels(feedback):
    block, expert, kernel = noise((7, 5), 0), noise((2, 5, 7), 1), noise((5, 3, 2, 2), 2)
    params = [nn.Parameter(t.clone()) for t in (block, expert, kernel)]
    settings = {"lr": 0.1, "rank": 2, "error_feedback": feedback, "correct_new_columns": True}
    groups = [
        {"params": [params[0]], "blocks": (3, 4)},
        {"params": [params[1]], "view": "batch"},
        {"params": [params[2]]},
    ]
    whole = DCTAdamW(groups, **settings)
    pieces = [
        nn.Parameter(t.clone())
        for t in (block[:3], block[3:], expert[0], expert[1], kernel.flatten(1))
    ]
    single = DCTAdamW(pieces, **settings)
    for t in range(4):
        for p in params:
            p.grad = gradient_of(p.shape, t)
        b, e, k = (p.grad for p in params)
        for p, g in zip(pieces, (b[:3], b[3:], e[0], e[1], k.flatten(1)), strict=True):
            p.grad = g.clone()
        whole.step()
        single.step()
    torch.testing.assert_close(params[0].detach(), torch.cat([p.detach() for p in pieces[:2]]))
    torch.testing.assert_close(params[1].detach(), torch.stack([p.detach() for p in pieces[2:4]]))
    torch.testing.assert_close(params[2].detach().flatten(1), pieces[4].detach())


EXTRA = {  # bytes beside moments and columns, for R×C from the right
    None: lambda rows, cols: 0,
    "full": lambda rows, cols: 4 * rows * cols,
    8: lambda rows, cols: rows * cols + 8 * rows,
    4: lambda rows, cols: rows * cols // 2 + 8 * rows,
}


@every_feedback
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)], ids=str)
def test_state_is_as_small_as_promised(feedback, shape):
    ours, theirs = weights(shape, dtype=torch.float32), weights(shape, dtype=torch.float32)
    optimizer, adamw = DCTAdamW(ours, rank=16, error_feedback=feedback), torch.optim.AdamW(theirs)
    train(optimizer, 1)
    train(adamw, 1)
    state = optimizer.state[ours[0]]
    long, short = max(shape), min(shape)
    sizes = {key: value.numel() * value.element_size() for key, value in state.items()}
    assert sizes.pop("columns") == 8 * 16
    assert sizes.pop("step") == 4
    assert sizes.pop("low_avg") + sizes.pop("low_avg_sq") == 4 * 2 * long * 16
    assert sum(sizes.values()) == EXTRA[feedback](long, short)
    whole = sum(v.numel() * v.element_size() for v in state.values())
    other = sum(v.numel() * v.element_size() for v in adamw.state[theirs[0]].values())
    if feedback in (None, 8):
        assert whole <= (0.26 if feedback is None else 0.40) * other


@every_feedback
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_state_survives_a_file_to_the_last_bit(feedback, dtype):
    shapes = ((9, 6), (6, 9), (6, 6))
    settings = {"error_feedback": feedback, "correct_new_columns": True, "update_gap": 2}
    make = lambda params: DCTAdamW(params, 0.01, 2, **settings)  # noqa: E731
    through, stopped = (make(weights(*shapes, dtype=dtype)) for _ in "ab")
    expected = train(through, 7)
    halfway = train(stopped, 3)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = DCTAdamW([nn.Parameter(p) for p in halfway], 0.5, 0.7)
    resumed.load_state_dict(saved)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = {
        "low_avg": dtype,
        "low_avg_sq": wide,
        "columns": torch.int64,
        "column_steps": torch.int64,
        "step": torch.float32,
        "error": dtype,
        "error_codes": torch.uint8,
        "error_range": wide,
    }
    for p, old in zip(resumed.param_groups[0]["params"], saved["state"].values(), strict=True):
        state = resumed.state[p]
        assert state.keys() == old.keys()
        for key, value in state.items():
            assert value.dtype == dtypes[key]
            assert torch.equal(value, old[key])
            assert value.numel() < 36 * 2
    for p, q in zip(train(resumed, 4, start=3), expected, strict=True):
        assert torch.equal(p, q)


def test_second_moments_of_bfloat16_are_not_rounded():
    source, target = (DCTAdamW(weights((8, 6), dtype=torch.bfloat16), rank=3) for _ in "ab")
    train(source, 3)
    target.load_state_dict(source.state_dict())
    old, new = (next(iter(o.state.values()))["low_avg_sq"] for o in (source, target))
    assert torch.equal(old, new)
    assert not torch.equal(old, old.bfloat16().float())
    assert old.data_ptr() != new.data_ptr()


@every_feedback
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_follows_float64(feedback, dtype):
    shapes = ((12, 8), (8, 12))
    rough, exact = (
        weights(*shapes, dtype=dtype),
        [nn.Parameter(p.double().detach()) for p in weights(*shapes, dtype=dtype)],
    )
    settings = {"lr": 0.05, "rank": 6, "error_feedback": feedback}
    one, other = DCTAdamW(rough, **settings), DCTAdamW(exact, **settings)
    start = [p.detach().clone() for p in exact]
    for t in range(3):
        for i, (p, q) in enumerate(zip(rough, exact, strict=True)):
            p.grad = gradient_of(p.shape, 0, i, dtype) + 0.1 * gradient_of(p.shape, t, 9, dtype)
            q.grad = p.grad.double()
        one.step()
        other.step()
    for p, q, old in zip(rough, exact, start, strict=True):
        rounding = 3 * torch.finfo(dtype).eps * old.norm()
        assert (p.double() - q).norm() < 0.03 * (q - old).norm() + rounding


@every_feedback
def test_gradients_are_left_bitwise(feedback):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in ((6, 9), (9, 6)):
            parameter = weights(shape, dtype=dtype)[0]
            optimizer = DCTAdamW([parameter], rank=2, error_feedback=feedback)
            for t in range(2):
                parameter.grad = gradient_of(shape, t, dtype=dtype)
                before = parameter.grad.clone()
                optimizer.step()
                assert torch.equal(parameter.grad, before)


@every_feedback
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_huge_and_outlying_gradients(feedback, dtype):
    for fill in (0.0, 1e-3, 1e15):
        parameter = weights((9, 6), dtype=dtype)[0]
        before = parameter.detach().clone()
        optimizer = DCTAdamW([parameter], rank=2, error_feedback=feedback)
        for outlier in (1.0, 1e3):
            parameter.grad = torch.full((9, 6), fill, dtype=dtype)
            parameter.grad[0, 0] = fill * outlier
            optimizer.step()
        assert torch.isfinite(parameter).all()
        assert torch.equal(parameter, before) == (fill == 0)
        assert (parameter - before).abs().max() < 0.01


def test_a_random_basis_for_study():
    def rotation(n):
        return haar(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)

    parameter = weights((9, 6))[0]
    start = parameter.detach().clone()
    train(DCTAdamW([parameter], 0.1, 2, basis=rotation), 1)
    u = (start - parameter.detach()) @ rotation(6)
    assert int((u.abs().sum(0) > 1e-9).sum()) == 2
    torch.testing.assert_close(u.abs().amax(0).sort().values[-2:], torch.full((2,), 0.1).double())


def test_the_rest_is_adamw():
    parameter, vector = weights((6, 4), (5,))
    twin = weights((6, 4), (5,))[1]
    groups = [{"params": [parameter]}, {"params": [vector], "rule": "elementwise"}]
    optimizer = DCTAdamW(groups, rank=2, adamw_lr=0.1, adamw_weight_decay=0.2)
    adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.2)
    for t in range(3):
        parameter.grad = gradient_of((6, 4), t)
        vector.grad, twin.grad = (gradient_of((5,), t) for _ in "ab")
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(vector, twin)


def test_a_state_of_another_method_is_not_taken():
    adamw = torch.optim.AdamW(weights((6, 4)))
    train(adamw, 2)
    resumed, fresh = DCTAdamW(weights((6, 4)), rank=2), DCTAdamW(weights((6, 4)), rank=2)
    state = {**fresh.state_dict(), "state": adamw.state_dict()["state"]}
    with pytest.warns(UserWarning, match="no 'columns', so it is of another method"):
        resumed.load_state_dict(state)
    assert torch.equal(train(resumed, 2)[0], train(fresh, 2)[0])


def test_one_warning_for_too_large_a_rank():
    with pytest.warns(UserWarning, match="rank 7 is more than the width 4") as caught:
        optimizer = DCTAdamW(weights((9, 4), (4, 9), (8, 8)), rank=7)
    assert len([w for w in caught if "rank" in str(w.message)]) == 1
    train(optimizer, 2)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"lr": math.inf}, ValueError, "lr must be finite"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": -0.5}, ValueError, "rank must be a fraction"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be in \[0, 1\)"),
        ({"eps": -1.0}, ValueError, "eps must be finite"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be finite"),
        ({"update_gap": 0}, ValueError, "update_gap must be at least 1"),
        ({"update_gap": True}, TypeError, "update_gap must be an integer"),
        ({"error_feedback": 2}, ValueError, "error_feedback must be one of"),
        ({"error_feedback": "half"}, ValueError, "error_feedback must be one of"),
        ({"correct_new_columns": True, "rotate": False}, ValueError, "needs rotate=True"),
        ({"side": "up"}, ValueError, "side must be one of"),
        ({"maximize": True}, ValueError, "maximize must be False"),
    ],
    ids=str,
)
def test_bad_settings(setting, error, message):
    with pytest.raises(error, match=message):
        DCTAdamW(weights((6, 4)), **setting)


def test_bad_gradients():
    parameter = weights((6, 4))[0]
    optimizer = DCTAdamW([parameter], error_feedback=8)
    before = parameter.detach().clone()
    parameter.grad = noise((6, 4), 0).to_sparse()
    with pytest.raises(RuntimeError, match="DCTAdamW does not support sparse"):
        optimizer.step()
    parameter.grad = torch.full_like(parameter, math.inf)
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        optimizer.step()
    assert torch.equal(parameter, before)
    assert not optimizer.state
    for feedback in FEEDBACK:
        optimizer = DCTAdamW([parameter], nonfinite="propagate", error_feedback=feedback)
        optimizer.step()
        assert parameter.isnan().any()
        parameter.data.copy_(before)
