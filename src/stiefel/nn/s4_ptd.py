"""S4-PTD: the S4D layer, started from HiPPO-LegS perturbed and diagonalised.

Source: Yu et al., arXiv 2310.01698.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stiefel.linalg.hippo_ptd import hippo_ptd
from stiefel.nn.s4d import S4D
from stiefel.nn.s4d_init import check_state_size

# What the start fixes, and so is not taken from the caller.
FIXED = ("init", "scale_real", "scale_imag", "official_clip")


class S4PTD(S4D):
    """:class:`S4D` whose A and B are those of LegS + t P Pᵀ, B times 1 - t/2.

    At the start every channel is, to a relative error below t/(2 - 2t) at every frequency, a HiPPO
    system; S4D-LegS is that at low frequencies only, and resonates at higher ones. The output map
    starts as C̃ = C V with C real, standard normal. Training, steps, states and ``state_dict`` are
    those of S4D.

    A real eigenvalue (t ≤ 0.001 or small ``d_state``) has a mode of its own, with half its B, since
    the layer takes twice the real part of every mode; ``layer.d_state`` is then above ``d_state``.

    Args:
        d_model: H, channels in and out.
        d_state: N, order of LegS, even.
        t: part of P Pᵀ that is added, in (0, 1]; 0.1 perturbs by 0.0785 ‖A‖.
        **s4d: as :class:`S4D`, except ``init`` and the factors on A.

    Raises:
        ValueError: ``t`` or a size out of range.
        TypeError: ``init`` or a factor on A is given.
        IllConditionedError: ``t`` is too small for this order.
    """

    def __init__(self, d_model: int, d_state: int = 64, t: float | int = 0.1, **s4d: Any) -> None:
        for name in FIXED:
            if name in s4d:
                raise TypeError(f"S4PTD starts from hippo_ptd and takes no {name}; S4D does")
        a, b, v, weights = hippo_ptd(check_state_size(d_state), t=t)
        super().__init__(d_model, 2 * len(a), init=(a, b * weights / 2), **s4d)
        shape = (*self.kernel.C.shape[:2], d_state)
        c = torch.randn(shape, generator=s4d.get("generator"), dtype=torch.float64)
        c = torch.view_as_real(c.to(v.dtype) @ v)
        self.kernel.C = nn.Parameter(c.to(self.kernel.C))
        self.t = t
