import math

import pytest
import torch

from stiefel.linalg import hippo_ptd, legs_transfer
from stiefel.linalg.hippo import hippo_legs, transfer_function
from stiefel.nn import S4D, S4PTD, ssm_param_groups


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("n", "t"), [(16, 0.1), (8, 0.01), (2, 0.1), (16, 1.0)])
def test_kernel_is_that_of_perturbed_legs(n, t):
    """K[l] = C Ā^l B̄ with a real C, from one matrix exponential; with real eigenvalues too."""
    layer = S4PTD(3, n, t, generator=generator(), dtype=torch.float64)
    twin = S4D(3, layer.d_state, generator=generator(), dtype=torch.float64)
    assert len(list(layer.parameters())) == len(list(twin.parameters()))
    v = hippo_ptd(n, t=t)[2]
    # C̃ = C V for one real C, found back from real and imaginary parts.
    c = torch.view_as_complex(layer.kernel.C.detach())[0]
    table = torch.cat([v.real, v.imag], dim=1)
    real = torch.linalg.lstsq(table.T, torch.cat([c.real, c.imag], dim=1).T).solution.T
    torch.testing.assert_close(real.to(v.dtype) @ v, c)
    a, b = hippo_legs(n)
    p = b / math.sqrt(2)
    a, b = a + t * torch.outer(p, p), (1 - t / 2) * b
    kernel = layer.kernel(20)[0].detach()
    for h, dt in enumerate(layer.kernel.dt.detach().flatten().tolist()):
        step = torch.linalg.matrix_exp(a * dt)
        x = torch.linalg.solve(a, (step - torch.eye(n, dtype=a.dtype)) @ b)
        for k in range(20):
            assert float(kernel[h, k]) == pytest.approx(float(real[h] @ x), abs=1e-8)
            x = step @ x


def test_output_map_starts_as_a_real_standard_normal_one():
    layer = S4PTD(300, 16, generator=generator(), dtype=torch.float64)
    v = hippo_ptd(16)[2]
    c = torch.view_as_complex(layer.kernel.C.detach())[0]
    table = torch.cat([v.real, v.imag], dim=1)
    real = torch.linalg.lstsq(table.T, torch.cat([c.real, c.imag], dim=1).T).solution.T
    covariance = real.T @ real / 300
    torch.testing.assert_close(covariance, torch.eye(16).double(), atol=0.3, rtol=0)


def test_every_channel_starts_near_hippo_at_every_frequency():
    kernel = S4PTD(2, 64, generator=generator(), dtype=torch.float64).kernel
    v = hippo_ptd(64)[2]
    omega = torch.cat([torch.zeros(1), torch.logspace(-2, 4, 300)]).double()
    a, b = kernel.A[0].detach(), torch.view_as_complex(kernel.B.detach())[0]
    g = transfer_function(a, b, v[0].clone(), omega)
    assert float((g - 1 / (1 + 1j * omega)).abs().max()) < 8.2e-4
    torch.testing.assert_close(g, legs_transfer(64, omega, 0.1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("n", [2, 4, 16, 64, 256])
def test_stable_and_the_same_step_by_step(n):
    layer = S4PTD(3, n, generator=generator())
    assert float(layer.kernel.A.detach().real.max()) < 0
    assert torch.equal(layer.kernel.a_re.isfinite(), torch.ones_like(layer.kernel.a_re).bool())
    u = torch.randn(2, 50, 3, generator=generator(1))
    with torch.no_grad():
        whole, end = layer(u)
        layer.mode = "recurrent"
        slow, last = layer(u)
    torch.testing.assert_close(slow, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, end, atol=1e-5, rtol=1e-5)


def test_real_eigenvalues_have_a_mode_each():
    layer = S4PTD(3, 8, 0.01)
    assert layer.d_state == 10
    assert int((layer.kernel.a_im[0] == 0).sum()) == 2
    assert S4PTD(3, 16).d_state == 16


def test_options_reach_the_layer():
    layer = S4PTD(4, 8, bidirectional=True, disc="bilinear", n_ssm=2, generator=generator())
    assert layer.kernel.C.shape == (2, 4, 4, 2)
    assert layer.kernel.a_re.shape == (2, 4)
    u = torch.randn(2, 20, 4, generator=generator())
    assert layer(u)[1] is None
    frozen = S4PTD(4, 8, lr=0)
    assert not frozen.kernel.B.requires_grad
    assert frozen.kernel.C.requires_grad
    assert ssm_param_groups(S4PTD(4, 8), lr=1e-2)[1]["lr"] == 1e-3
    same = [S4PTD(4, 8, generator=generator(5)) for _ in range(2)]
    assert torch.equal(same[0].kernel.C, same[1].kernel.C)
    assert same[0].kernel.C.std() < 1.5


def test_state_dict_fits_s4d():
    layer, plain = S4PTD(4, 8, generator=generator()), S4D(4, 8, generator=generator(1))
    plain.load_state_dict(layer.state_dict())
    u = torch.randn(2, 20, 4, generator=generator())
    assert torch.equal(plain(u)[0], layer(u)[0])


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (ValueError, "even", {"d_state": 7}),
        (ValueError, "t must be in", {"t": 0}),
        (ValueError, "t must be in", {"t": 1.5}),
        (TypeError, "takes no init", {"init": "legs"}),
        (TypeError, "takes no scale_imag", {"scale_imag": 2.0}),
    ],
)
def test_bad_settings(error, match, settings):
    with pytest.raises(error, match=match):
        S4PTD(4, **settings)
