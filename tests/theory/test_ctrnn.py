import math

import pytest
import torch

from stiefel.theory import CTRNN, ctrnn_states

W = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.2], [-0.6, 0.3, 0.7]], dtype=torch.float64)
X = torch.tensor([[[1, 0], [0, 1], [1, 1]], [[0.5, -0.5], [1, 0], [0, 0.5]]], dtype=torch.float64)


def sheet_network(w=W):
    net = CTRNN(2, 3, 2, w0=w)
    with torch.no_grad():
        net.i2h.weight.copy_(
            torch.tensor([[0.3, -0.1], [0.2, 0.5], [-0.4, 0.6]], dtype=torch.float64)
        )
        net.h2o.weight.copy_(torch.tensor([[1, -1, 0.5], [0.2, 0.3, -0.7]], dtype=torch.float64))
    return net


def test_values_of_the_sheet():
    net = sheet_network()
    h = torch.tensor([[0.113, 0.848, 0.719], [0.084, 0.378, 0.126]], dtype=torch.float64)
    o = torch.tensor([[-0.3755, -0.2263], [-0.231, 0.042]], dtype=torch.float64)
    torch.testing.assert_close(net.hidden(X)[:, -1], h, rtol=0, atol=1e-14)
    torch.testing.assert_close(net(X)[:, -1], o, rtol=0, atol=1e-14)


@pytest.mark.parametrize("alpha", [1, 1.0, 0.3])
def test_step_by_step(alpha, generator):
    net = CTRNN(2, 5, 3, alpha, generator=generator).double()
    x = torch.randn(4, 6, 2, generator=generator, dtype=torch.float64)
    h, outputs = torch.zeros(4, 5, dtype=torch.float64), []
    for t in range(6):
        drive = net.i2h(x[:, t]) + net.h2h(h)
        h = torch.relu((1 - alpha) * h + alpha * drive)
        outputs.append(net.h2o(h))
    torch.testing.assert_close(net(x), torch.stack(outputs, 1))


def test_a_stack_of_networks_is_one_by_one(generator):
    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    w_in, w = draw(3, 5, 2), 0.4 * draw(3, 5, 5)
    for x in (draw(4, 6, 2), draw(3, 4, 6, 2)):
        h = ctrnn_states(w_in, w, x, 0.5)
        assert h.shape == (3, 4, 6, 5)
        for i in range(3):
            one = ctrnn_states(w_in[i], w[i], x if x.ndim == 3 else x[i], 0.5)
            torch.testing.assert_close(h[i], one)


def test_gradients(generator):
    w = (0.5 * torch.randn(4, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    w_in = torch.rand(4, 2, generator=generator, dtype=torch.float64).requires_grad_()
    x = torch.rand(3, 4, 2, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: ctrnn_states(a, b, x, 0.7), (w_in, w))


def test_start(generator):
    net = CTRNN(4, 400, 5, generator=generator)
    assert float(net.h2h.weight.detach().std()) == pytest.approx(1.25 / 20, rel=0.02)
    for layer, fan in ((net.i2h, 4), (net.h2o, 400)):
        assert layer.bias is None
        largest = float(layer.weight.detach().abs().max())
        assert 0.9 / math.sqrt(fan) < largest <= 1 / math.sqrt(fan)
    w0 = torch.eye(3, dtype=torch.float64)
    net = CTRNN(1, 3, 1, w0=w0)
    w0.zero_()
    assert net.h2o.weight.dtype == torch.float64
    torch.testing.assert_close(net.h2h.weight.detach(), torch.eye(3, dtype=torch.float64))
    same = [CTRNN(2, 3, 1, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    for a, b in zip(same[0].parameters(), same[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_explosions_name_the_step():
    net = CTRNN(1, 2, 1, w0=1e30 * torch.ones(2, 2))
    with torch.no_grad():
        net.i2h.weight.fill_(1.0)
    x = torch.ones(2, 5, 1)
    with pytest.raises(FloatingPointError, match="from step 3 of 5"):
        net(x)
    net.check_finite = False
    assert not net(x).isfinite().all()


def test_bad_input():
    with pytest.raises(ValueError, match="at least 1"):
        CTRNN(0, 3, 1)
    for alpha in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            CTRNN(1, 3, 1, alpha)
    with pytest.raises(ValueError, match=r"\[3, 3\], got \(2, 2\)"):
        CTRNN(1, 3, 1, w0=torch.eye(2))
    with pytest.raises(ValueError, match="finite"):
        CTRNN(1, 3, 1, w0=math.nan * torch.eye(3))
    with pytest.raises(ValueError, match="one step"):
        CTRNN(1, 3, 1)(torch.zeros(2, 0, 1))
