"""Run by test_tensor_product_core in a process of its own: checked annotations cannot compile."""

import torch

from stiefel.numerics.tensor_product import FastDiagonalization, axis_apply, grid1d

g = torch.Generator().manual_seed(0)
axes = [grid1d(5), grid1d(6, bc="neumann"), grid1d(7, bc="periodic")]
U = torch.randn(2, 5, 6, 7, dtype=torch.float64, generator=g, requires_grad=True)
for method in ("gemm", "transform"):
    solver = FastDiagonalization(axes, 0.3, method=method)
    for field in (U, U.detach().float()):
        for run in (solver.solve, solver.apply):
            fast = torch.compile(run, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(fast(field), run(field))
            if field.requires_grad:
                found, expected = (
                    torch.autograd.grad(f(field).square().sum(), field)[0] for f in (fast, run)
                )
                torch.testing.assert_close(found, expected)
mats = [torch.randn(3, n, dtype=torch.float64, generator=g) for n in (5, 6, 7)]
fast = torch.compile(lambda x: axis_apply(mats, x), backend="aot_eager", fullgraph=True)
torch.testing.assert_close(fast(U), axis_apply(mats, U))
print("one graph")
