"""Pencils over several processes: what arrives, what is solved, what is refused.

pytest starts this file under mpiexec (or torch's launcher) as often as there are processes; there
``main`` runs every check on every process, and a wrong one ends the run.
"""

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
TIMEOUT = 150
# Sizes that no mesh divides; an axis as short as its number of processes.
SHAPES = {2: [(5, 7), (4, 9)], 3: [(5, 7, 6), (4, 5, 4)], 4: [(3, 5, 4, 2)]}


def launch(count, *arguments, launcher="mpi"):
    """What the first process printed, as JSON."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = [Path(sys.executable).with_name("mpiexec"), "-n", count, sys.executable]
    if launcher == "torch":
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", count]
    process = subprocess.run(
        [str(word) for word in (*start, HERE, launcher, *arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("count", "meshes"),
    [(2, ["1x2", "2x1", "2"]), (4, ["2x2", "4", "2x1x2"])],
    ids=["two", "four"],
)
def test_processes_over_mpi(count, meshes):
    report = launch(count, *meshes)
    assert report["meshes"] == meshes
    assert report["moves"] >= 12 * len(meshes)
    assert report["solutions"] >= 8 * len(meshes)
    assert report["worst"] < 1e-12


def test_two_processes_over_torch_distributed():
    report = launch(2, "1x2", launcher="torch")
    assert report["moves"] >= 27
    assert report["worst"] < 1e-12


def test_the_example_has_the_error_of_the_discretisation():
    script = HERE.parents[2] / "examples" / "distributed_poisson.py"
    command = [Path(sys.executable).with_name("mpiexec"), "-n", "2", sys.executable, script]
    process = subprocess.run(
        [*map(str, command), "--points", "31", "--mesh", "1x2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    # The field is one mode: its factor is the quotient of the eigenvalues, continuous and discrete.
    steps = (1 / 32, 2 / 32, 1 / 31)
    waves = (math.pi, math.pi, 2 * math.pi)
    discrete = sum((2 / h * math.sin(k * h / 2)) ** 2 for h, k in zip(steps, waves, strict=True))
    expected = 6 * math.pi**2 / discrete - 1
    assert float(process.stdout.split("largest error ")[1]) == pytest.approx(expected, rel=1e-3)


def test_an_mpi_that_is_missing_is_named_with_its_extra(monkeypatch):
    from stiefel.numerics.tensor_product import PencilGrid

    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'stiefel\[mpi\]'"):
        PencilGrid((1, 1))
    transport = import_module("stiefel.numerics.tensor_product.pencils_transport")

    def no_library(name):
        raise RuntimeError("cannot load MPI library")

    monkeypatch.setattr(transport, "import_module", no_library)
    with pytest.raises(ImportError, match=r"no MPI library \(cannot load MPI library\)"):
        PencilGrid((1, 1))


@pytest.mark.parametrize(
    ("mesh", "error", "message"),
    [
        ((), ValueError, r"mesh must have 1 to 3 dimensions, got \(\)"),
        ((1, 1, 1, 1), ValueError, "mesh must have 1 to 3 dimensions"),
        ((2, 0), ValueError, r"mesh\[1\] must be at least 1, got 0"),
        ((2.0,), TypeError, r"mesh\[0\] must be an integer"),
        (4, TypeError, "mesh must be numbers of processes"),
    ],
)
def test_bad_meshes(mesh, error, message):
    from stiefel.numerics.tensor_product import PencilGrid

    with pytest.raises(error, match=message):
        PencilGrid(mesh)


def test_even_split():
    from stiefel.numerics.tensor_product.pencils import even_split

    assert even_split(11, 4) == [3, 3, 3, 2]
    assert even_split(8, 4) == [2] * 4
    assert even_split(4, 4) == [1] * 4


# What every process runs; torch is imported there.


def fields(shape):
    """The same random fields on every process: real and complex, with a batch and without."""
    import torch

    generator = torch.Generator().manual_seed(sum(shape))
    for batch, dtype in (((), torch.float64), ((2,), torch.complex64), ((1, 2), torch.float32)):
        yield torch.randn(*batch, *shape, generator=generator, dtype=dtype)


def check_moves(grid, shape):
    """Every pencil to every other one, against cutting the global field."""
    import torch

    count = 0
    for U in fields(shape):
        for start in range(grid.dims):
            block = grid.local_block(U, start)
            for goal in range(grid.dims):
                moved = grid.redistribute(block, start, goal - grid.dims)
                assert moved.is_contiguous()
                assert torch.equal(moved, grid.local_block(U, goal)), (start, goal)
                count += 1
            assert torch.equal(grid.gather(block, start), U)
    # Views that are not contiguous, and conjugated ones.
    U = torch.randn(*reversed(shape), generator=torch.Generator().manual_seed(1)) * (1 + 2j)
    V = U.permute(*reversed(range(U.ndim))).conj()
    block = V[grid.local_slices(shape, 0)]
    assert torch.equal(grid.redistribute(block, 0, 1), grid.local_block(V.resolve_conj(), 1))
    return count


def check_solutions(grid, shape):
    """Distributed fast diagonalisation against the serial one; gradients too."""
    import torch

    from stiefel.numerics.tensor_product import FastDiagonalization, grid1d, pencil_solve

    ends = ["dirichlet", "neumann", "periodic", "dirichlet-neumann"]
    d, worst, count = grid.dims, 0.0, 0
    problems = [
        ([grid1d(n, 1.0) for n in shape], 0.0),
        ([grid1d(n, 2.0, "neumann") for n in shape], 0.0),
        ([grid1d(n, 1.0, ends[i]) if n > 2 else grid1d(n) for i, n in enumerate(shape)], 1.5),
        ([grid1d(n, 1.0, "neumann", ("bspline", 1)) for n in shape], 1.0),
        ([grid1d(n) for n in shape], 1.0 + 2.0j),
    ]
    generator = torch.Generator().manual_seed(3)
    for axes, shift in problems:
        solver = FastDiagonalization(axes, shift, incompatible="project")
        F = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        F = F * (1 + 1j) if isinstance(shift, complex) else F
        expected = solver.solve(F)
        for axis in range(d):
            U = pencil_solve(grid, solver, grid.local_block(F, axis), axis)
            assert U.shape == grid.local_block(F, axis).shape
            error = (grid.gather(U, axis) - expected).abs().max() / expected.abs().max()
            worst, count = max(worst, float(error)), count + 1
    solver = FastDiagonalization([grid1d(n) for n in shape])
    F, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    block = grid.local_block(F, 1).requires_grad_()
    U = pencil_solve(grid, solver, block, 1)
    (U * grid.local_block(w, 1)).sum().backward()
    error = (grid.gather(block.grad, 1) - solver.solve(w)).abs().max()
    return count, max(worst, float(error))


def check_transforms(grid):
    """Axes long enough for fast transforms."""
    import torch

    from stiefel.numerics.tensor_product import FastDiagonalization, grid1d, pencil_solve

    shape = (99, 100, 4)[: grid.dims]
    if grid.dims > 3:
        return 0.0
    ends = ("dirichlet", "periodic", "neumann")[: grid.dims]
    axes = [grid1d(n, 1.0, bc) for n, bc in zip(shape, ends, strict=True)]
    solver = FastDiagonalization(axes)
    assert "hartley" in solver.transforms
    F = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U = pencil_solve(grid, solver, grid.local_block(F))
    expected = solver.solve(F)
    return float((grid.gather(U) - expected).abs().max() / expected.abs().max())


def refused(error, message, call, *arguments):
    """On every process, or the others would wait."""
    with pytest.raises(error, match=message):
        call(*arguments)


def check_errors(grid, shape):
    """A mistake on one process, or on all, is an error on all."""
    import torch

    from stiefel.numerics.tensor_product import (
        FastDiagonalization,
        IncompatibleDataError,
        IncompatibleDataWarning,
        grid1d,
        pencil_solve,
    )

    last = all(c == m - 1 for c, m in zip(grid.coordinates, grid.mesh, strict=True))
    generator = torch.Generator().manual_seed(5)  # the same field on every process
    U = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    good = grid.local_block(U, 0)
    cut = good[:, :-1] if last else good
    refused(
        ValueError, r"process \d must hold \d of \d points of axis 0", grid.redistribute, cut, 0, 1
    )
    refused(ValueError, "agree in their batch", grid.redistribute, good[:1] if last else good, 0, 1)
    refused(ValueError, "has torch.float", grid.redistribute, good.float() if last else good, 0, 1)
    refused(TypeError, r"process \d: U must be float32", grid.redistribute, good.half(), 0, 1)
    flat = good.flatten() if last else good
    refused(ValueError, r"process \d: U must have at least", grid.redistribute, flat, 0, 1)
    refused(IndexError, "to_axis must be in", grid.redistribute, good, 0, grid.dims)
    many = max(grid.mesh)
    axis = 1 if grid.mesh[0] == many else grid.dims - 1
    short = [many - 1 if j == axis else n for j, n in enumerate(shape)]
    refused(ValueError, f"axis {axis} has {many - 1} points, too few", grid.local_slices, short)
    refused(ValueError, "shape must have", grid.local_slices, [*shape, 3])
    refused(ValueError, "at least", grid.local_block, U[(0,) * 2])

    solver = FastDiagonalization([grid1d(n) for n in shape])
    holed = good.clone()
    if last:
        holed[..., 0] = float("nan")
    refused(ValueError, r"process \d: F must be finite", pencil_solve, grid, solver, holed)
    refused(ValueError, r"process \d: F must have", pencil_solve, grid, solver, cut)
    kinds = good.long() if last else good
    refused(TypeError, r"process \d: F must be float32", pencil_solve, grid, solver, kinds)
    damped = FastDiagonalization(solver.axes, 1j)
    refused(TypeError, "F must be complex", pencil_solve, grid, damped, good)
    line = FastDiagonalization([grid1d(5)])
    refused(ValueError, "a solver of 1 axes needs a mesh of 0", pencil_solve, grid, line, good)

    walls = [grid1d(n, 1.0, "neumann") for n in shape]
    raising = FastDiagonalization(walls)
    shifted = good * 0 + 1
    refused(IncompatibleDataError, "mean zero over all", pencil_solve, grid, raising, shifted)
    centred = U - U.mean(tuple(range(1, U.ndim)), keepdim=True)
    found = pencil_solve(grid, raising, grid.local_block(centred, 0))
    assert torch.allclose(grid.gather(found), raising.solve(centred), atol=1e-12)
    warning = FastDiagonalization(walls, incompatible="warn")
    with pytest.warns(IncompatibleDataWarning, match="it was taken out"):
        found = pencil_solve(grid, warning, shifted)
    assert float(found.abs().max()) < 1e-13


def make_grid(launcher, mesh):
    from stiefel.numerics.tensor_product import PencilGrid

    if launcher == "mpi":
        refused(ValueError, r"needs \d+ processes, but there are", PencilGrid, (*mesh, 3)[-3:])
        return PencilGrid(mesh)
    from torch.distributed.device_mesh import init_device_mesh

    return PencilGrid(init_device_mesh("cpu", mesh))


def main(launcher, *meshes):
    """All checks on all meshes; the first process prints a line of JSON."""
    import torch
    from jaxtyping import install_import_hook

    torch.set_num_threads(1)
    if launcher == "torch":
        torch.distributed.init_process_group("gloo")
    report = {"meshes": list(meshes), "moves": 0, "solutions": 0, "worst": 0.0}
    with install_import_hook("stiefel.numerics", "beartype.beartype"):
        import_module("stiefel.numerics.tensor_product")
    for name in meshes:
        mesh = tuple(map(int, name.split("x")))
        grid = make_grid(launcher, mesh)
        assert grid.mesh == mesh
        shapes = [
            shape
            for shape in SHAPES[grid.dims]
            if min(shape[1:]) >= max(mesh) and shape[0] >= mesh[0]
        ]
        assert shapes or grid.dims == 4
        for shape in shapes or SHAPES[4]:
            report["moves"] += check_moves(grid, shape)
            count, worst = check_solutions(grid, shape)
            report["solutions"] += count
            report["worst"] = max(report["worst"], worst)
        report["worst"] = max(report["worst"], check_transforms(grid))
        check_errors(grid, (shapes or SHAPES[4])[0])
        first = not any(grid.coordinates)
        grid.close()
    if launcher == "torch":
        torch.distributed.destroy_process_group()
    if first:
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
