"""A Poisson problem whose field no process holds whole: pencils over MPI, error reported.

mpiexec -n 4 python examples/distributed_poisson.py --points 64 --mesh 2x2

Every process makes its own part of the right-hand side, solves, and reports its largest error;
halving h divides it by four.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

from stiefel.numerics.tensor_product import FastDiagonalization, PencilGrid, grid1d, pencil_solve


def main() -> None:
    parser = argparse.ArgumentParser(description="Solve Poisson's equation over MPI.")
    parser.add_argument("--points", type=int, default=32, help="unknowns per axis")
    parser.add_argument("--mesh", default="1x1", help="processes along y and z, such as 2x2")
    options = parser.parse_args()
    torch.set_num_threads(1)  # one process per core
    try:
        grid = PencilGrid([int(part) for part in options.mesh.split("x")])
        if grid.dims != 3:
            raise ValueError(f"mesh must have two dimensions, got {options.mesh}")
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{error}\n")

    # Walls in x and y, a ring in z; one table of n numbers squared per axis is all that is shared.
    n = options.points
    axes = [grid1d(n, 1.0, "dirichlet"), grid1d(n, 2.0, "dirichlet"), grid1d(n, 1.0, "periodic")]
    solver = FastDiagonalization(axes)

    # Pencil 0: all of x, a part of y and z. Only these points are ever made here.
    slices = grid.local_slices(solver.shape, axis=0)
    parts = [axis.points[s] for axis, s in zip(axes, slices, strict=True)]
    x, y, z = torch.meshgrid(*parts, indexing="ij")
    exact = (math.pi * x).sin() * (math.pi * y).sin() * (2 * math.pi * z).cos()
    F = (1 + 1 + 4) * math.pi**2 * exact

    start = time.perf_counter()
    U = pencil_solve(grid, solver, F, axis=0)
    seconds = time.perf_counter() - start
    worst = max(grid.from_all(float((U - exact).abs().max())))
    if not any(grid.coordinates):
        shape = " x ".join(map(str, U.shape))
        print(f"{n}^3 unknowns on mesh {options.mesh}, {shape} of them here, {seconds:.3f} s")
        print(f"largest error {worst:.3e}")
    grid.close()


if __name__ == "__main__":
    main()
