"""What --explain says, against rotations and energies that are known beforehand."""

import io
import json
import math
import sys

import plan_models_on_disk as disk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.linalg import haar, rotation_exp
from stiefel.merge.engine import merge
from stiefel.merge.explain import (
    compare,
    explain,
    hyperspherical_energy,
    rotation_angles,
    seconds_to_explain,
)
from stiefel.merge.explain_report import figure, table
from stiefel.merge.plan import build_plan
from stiefel.merge.recipe import parse_recipe

RECIPE = """models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
merge_method: orthomerge
base_model: base
parameters: {residual: ta}
"""


def plane(n, angle, i=0, j=1):
    """The rotation of R^n that turns one plane."""
    r = torch.eye(n, dtype=torch.float64)
    c, s = math.cos(angle), math.sin(angle)
    r[i, i], r[j, j], r[i, j], r[j, i] = c, c, -s, s
    return r


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, math.pi), min_size=3, max_size=3), st.booleans())
def test_angles_are_those_of_the_planes(angles, odd):
    """Each plane twice, hidden behind a random basis; a 0 for the axis of an odd dimension."""
    n = 6 + odd
    r = torch.eye(n, dtype=torch.float64)
    for k, angle in enumerate(angles):
        r = r @ plane(n, angle, 2 * k, 2 * k + 1)
    basis = haar(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = sorted([*angles, *angles, *[0.0] * odd])
    found = rotation_angles(basis @ r @ basis.mT)
    # Near 0 and π the cosine is flat: half of the digits.
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), atol=3e-7, rtol=0
    )


def test_energy_of_known_directions():
    assert hyperspherical_energy(torch.eye(4, dtype=torch.float64)) == pytest.approx(0.5**0.5)
    pair = torch.tensor([[2.0, 0.0], [-5.0, 0.0]])
    assert hyperspherical_energy(pair) == 0.5
    assert hyperspherical_energy(torch.tensor([[1.0, 0.0], [3.0, 0.0]])) == math.inf
    assert math.isnan(hyperspherical_energy(torch.tensor([[1.0, 0.0], [0.0, 0.0]])))
    three = torch.cat([pair, torch.tensor([[0.0, 1.0]])])
    slow = (0.5 + 2 * 0.5**0.5) / 3
    assert hyperspherical_energy(three) == pytest.approx(slow)
    assert hyperspherical_energy(three, rows=2) == pytest.approx(0.5**0.5)  # first and last


def test_energy_does_not_see_rotations_and_lengths():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    turned = w @ haar(7, generator=generator, dtype=torch.float64)
    scaled = turned * torch.rand(20, 1, generator=generator, dtype=torch.float64)
    assert hyperspherical_energy(scaled) == pytest.approx(hyperspherical_energy(w), rel=1e-12)
    assert hyperspherical_energy(w + 1) > hyperspherical_energy(w)


def test_a_pure_rotation_leaves_no_rest():
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    change = compare(w, w @ plane(8, 0.3))
    assert change.angle_max == pytest.approx(math.degrees(0.3), abs=1e-5)
    assert change.angle_mean == pytest.approx(math.degrees(0.3) / 4, abs=1e-4)
    assert change.residual < 1e-12
    assert change.difference > 0.01


@pytest.mark.parametrize("size", [0.001, 0.1, 2.0])
def test_large_matrices_are_compared_in_float32(monkeypatch, size):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(60, 40, generator=generator, dtype=torch.float64)
    q = torch.randn(40, 40, generator=generator, dtype=torch.float64) * size / 40**0.5
    other = w @ rotation_exp((q - q.mT) / 2) + 0.1 * size * torch.randn(60, 40, generator=generator)
    exact = compare(w, other)
    monkeypatch.setattr(sys.modules[compare.__module__], "FLOAT64_UP_TO", 20)
    found = compare(w, other)
    assert found != exact
    assert found.angle_max == pytest.approx(exact.angle_max, abs=1e-4)
    assert found.angle_mean == pytest.approx(exact.angle_mean, abs=1e-4)
    assert found.residual == pytest.approx(exact.residual, abs=1e-6)
    assert (found.difference, found.energy) == (exact.difference, exact.energy)


def test_wide_matrices_turn_only_where_they_have_rows():
    """Without the null space's free choice: a turn of 0.3 is found in 3 rows of 40 inputs."""
    w = torch.zeros(3, 40, dtype=torch.float64)
    w[0, 0], w[1, 1], w[2, 2] = 3.0, 2.0, 1.0
    change = compare(w, w @ plane(40, 0.3))
    assert change.angle_max == pytest.approx(math.degrees(0.3), abs=1e-5)
    assert change.residual < 1e-12


def test_scaling_is_all_rest():
    w = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change = compare(w, 1.5 * w)
    assert change.angle_max < 1e-5
    assert (change.residual, change.difference) == pytest.approx((0.5, 0.5))
    same = compare(w, w)
    assert (same.angle_max, same.residual, same.difference) == (0, 0, 0)
    large = compare(w, 1.5 * w, max_side=7)
    assert (large.angle_max, large.residual) == (None, None)
    assert large.difference == pytest.approx(0.5)
    assert compare(torch.zeros(3, 2), torch.ones(3, 2)).difference == math.inf


@pytest.fixture
def folder(tmp_path):
    """Experts that are rotations of the base by 0.2 in different planes."""
    held = disk.tensors(0, dtype=torch.float64)
    disk.write(tmp_path / "base", held)
    for name, plane_of in (("a", (0, 1)), ("b", (2, 3))):
        turned = {
            key: w @ plane(8, 0.2, *plane_of) if w.ndim == 2 and "embed" not in key else w
            for key, w in held.items()
        }
        disk.write(tmp_path / name, turned)
    return tmp_path


def test_a_merge_is_explained_layer_by_layer(folder):
    plan = build_plan(parse_recipe(RECIPE), folder)
    merge(plan, folder / "out", threads=1)
    seen = []
    told = explain(plan, folder / "out", on_progress=lambda fraction, name: seen.append(fraction))
    assert told.reference == "base"
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert len(seen) == len(told.matrices) == 6  # embedding, head and norms are left out
    rows = told.layers()
    assert [row["layer"] for row in rows] == [0, 1, 2]
    for row in rows:
        for summary in (*row["experts"].values(), row["merged"]):
            assert summary["residual"] < 1e-7
            assert summary["energy"] == pytest.approx(row["energy_before"], rel=1e-7)
        assert row["experts"]["a"]["angle_max"] == pytest.approx(math.degrees(0.2), abs=1e-5)
        # Orthogonal planes: the mean of the Lie coordinates, grown by √2, in each of them.
        angle = 2 * math.atan(math.tan(0.1) / 2**0.5)
        assert row["merged"]["angle_max"] == pytest.approx(math.degrees(angle), abs=1e-5)
    assert json.loads(json.dumps(told.to_json(), allow_nan=False))["layers"][2]["matrices"] == 2


def test_before_a_merge_only_the_experts_are_told(folder):
    plan = build_plan(parse_recipe(RECIPE), folder)
    told = explain(plan, max_side=4)
    assert told.layers()[0]["merged"] is None
    assert told.skipped == 6
    # 3 layers, 2 matrices of 8 inputs, 2 experts and the result.
    assert seconds_to_explain(plan) == pytest.approx(1.5 * seconds_to_explain(plan, merged=False))
    assert seconds_to_explain(plan) == pytest.approx(6 * 3 * 8**3 * 6e-10)
    assert seconds_to_explain(plan, max_side=4) == 0
    assert "have more than 4 inputs" in told.notes[0]
    assert told.layers()[0]["experts"]["a"]["angle_max"] is None


def test_without_a_base_the_first_model_is_the_reference(folder):
    text = RECIPE.replace("orthomerge", "linear").replace("base_model: base\n", "")
    told = explain(
        build_plan(parse_recipe(text.replace("parameters: {residual: ta}\n", "")), folder)
    )
    assert told.reference == "a"
    assert list(told.layers()[0]["experts"]) == ["b"]


def test_what_cannot_be_explained(folder):
    stack = "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\nmerge_method: passthrough\n"
    with pytest.raises(ValueError, match="nothing to explain"):
        explain(build_plan(parse_recipe(stack), folder))
    held = disk.tensors(0, dtype=torch.float64)
    held["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    disk.write(folder / "a", held)
    with pytest.raises(ValueError, match=r"up_proj.weight of a has NaN"):
        explain(build_plan(parse_recipe(RECIPE), folder))
    disk.write(folder / "a", seed=1)
    other = {key: w[:, :7] if w.ndim == 2 else w for key, w in disk.tensors(1).items()}
    with pytest.raises(ValueError, match="not the result of this plan"):
        explain(
            build_plan(parse_recipe(RECIPE), folder),
            disk.write(folder / "x", {k: v.contiguous() for k, v in other.items()}),
        )


def test_weights_stored_the_other_way_are_turned_over(tmp_path):
    """GPT-2 keeps [in, out]: a turn of the inputs is from the left there."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    settings = {"model_type": "gpt2", "n_layer": 1, "vocab_size": 10}
    for name, r in (("base", torch.eye(8).double()), ("a", plane(8, 0.2)), ("b", plane(8, 0.1))):
        disk.write(tmp_path / name, {"h.0.attn.c_attn.weight": r.mT @ w}, settings)
    (row,) = explain(build_plan(parse_recipe(RECIPE), tmp_path)).layers()
    assert row["experts"]["a"]["angle_max"] == pytest.approx(math.degrees(0.2), abs=1e-5)
    assert row["experts"]["a"]["residual"] < 1e-12


def test_table_and_picture(folder):
    from rich.console import Console

    plan = build_plan(parse_recipe(RECIPE), folder)
    merge(plan, folder / "out", threads=1)
    told = explain(plan, folder / "out")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(told))
    text = console.export_text()
    assert "11.46°" in text
    assert text.count("merged") == 3
    panels = figure(told).axes
    assert len(panels) == 3
    labels = [line.get_label() for line in panels[0].lines]
    assert labels == ["a", "b", "merged"]
    angles = panels[0].lines[0].get_ydata()
    assert list(angles) == pytest.approx([math.degrees(0.2)] * 3, abs=1e-5)


def test_rotations_of_adapters_keep_the_energy():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    q = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    change = compare(w, w @ rotation_exp(0.1 * (q - q.mT)))
    assert change.energy == pytest.approx(hyperspherical_energy(w), rel=1e-12)
    assert change.residual < 1e-12
