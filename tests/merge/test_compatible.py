"""Maps between embedding models: what they keep, what they find, what they refuse."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from stiefel.linalg import haar, orthogonality_distance
from stiefel.merge import (
    CompatibleMaps,
    CompatibleSettings,
    OrthogonalMap,
    contrastive_loss,
    fit_compatible_maps,
    retrieval_metrics,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(n=200, d=8, width=8, noise=0.0, seed=0):
    """New vectors of ten classes, and old ones that are a rotation of them."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 10
    new = draw(10, width, seed=seed + 1)[y] + 0.3 * torch.randn(n, width, generator=g)
    rotation = haar(width, width, generator=g)
    old = (new @ rotation.T)[:, :d] + noise * torch.randn(n, d, generator=g)
    return old, new, y, rotation


class TestOrthogonalMap:
    @pytest.mark.parametrize("rotation", ["cayley", "exp"])
    def test_strict_stays_orthogonal_whatever_the_steps(self, rotation):
        layer = OrthogonalMap(6, rotation=rotation)
        optimizer = torch.optim.SGD(layer.parameters(), lr=5.0)
        x, y = draw(30, 6), draw(30, 6, seed=1)
        for _ in range(10):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
        assert float(orthogonality_distance(layer.weight.detach())) < 1e-4
        assert not torch.allclose(layer.weight, torch.eye(6), atol=0.1)
        assert float(layer.penalty()) == 0

    @pytest.mark.parametrize("rotation", ["cayley", "exp"])
    def test_gradients(self, rotation):
        layer = OrthogonalMap(4, rotation=rotation).double()
        x = draw(3, 4).double()

        def apply(coordinates):
            return torch.func.functional_call(layer, {"coordinates": coordinates}, (x,))

        start = (0.3 * draw(6)).double().requires_grad_()
        torch.autograd.gradcheck(apply, (start,))

    def test_starts_where_told_and_resets(self):
        start = haar(5, 5, generator=torch.Generator().manual_seed(3))
        for mode in ("strict", "lambda"):
            layer = OrthogonalMap(5, mode, start=start)
            torch.testing.assert_close(layer.weight, start)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.add_(1)
            layer.reset_parameters()
            torch.testing.assert_close(layer.weight, start)
            torch.testing.assert_close(layer(draw(2, 5)), draw(2, 5) @ start.T)

    def test_the_penalty_is_that_of_its_weight(self):
        layer = OrthogonalMap(16, "lambda")
        assert layer.lam == pytest.approx(0.37 * 4)
        assert float(layer.penalty().detach()) == 0
        with torch.no_grad():
            layer.free.mul_(3)
        assert float(layer.penalty().detach()) == pytest.approx(8 * 4, rel=1e-5)

    def test_state_goes_through_a_file_and_shows_itself(self):
        layer = OrthogonalMap(4, "lambda", lam=2.0)
        twin = OrthogonalMap(4, "lambda", lam=2.0)
        with torch.no_grad():
            layer.free.add_(0.1)
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin.weight, layer.weight)
        assert "features=4, mode='lambda', lam=2" in repr(layer)
        assert "rotation='cayley'" in repr(OrthogonalMap(4))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"mode": "loose"}, "mode must be one of strict, lambda"),
            ({"rotation": "givens"}, "rotation must be one of cayley, exp"),
            ({"lam": -1.0}, "lam must be at least 0"),
            ({"alpha": 0.0}, "alpha must be positive"),
            ({"features": 0}, "features must be at least 1"),
            ({"start": torch.ones(3, 3)}, "start must be orthogonal"),
            ({"start": torch.eye(2)}, "start must be"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            OrthogonalMap(**{"features": 3, **arguments})


class TestContrastiveLoss:
    @pytest.mark.parametrize(("tau", "value"), [(0.1, 1.0449126070254102), (1, 0.9010688520194586)])
    def test_values_of_the_sheet(self, tau, value):
        a = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
        loss = contrastive_loss(a, a, torch.tensor([0, 1, 0]), float(tau))
        assert float(loss) == pytest.approx(value, rel=1e-13)

    def test_without_labels_it_is_cross_entropy_of_the_pairs(self):
        a, b = draw(5, 3), draw(5, 3, seed=1)
        scores = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T / 0.1
        wanted = torch.nn.functional.cross_entropy(scores, torch.arange(5))
        torch.testing.assert_close(contrastive_loss(a, b), wanted)
        torch.testing.assert_close(contrastive_loss(a, b, torch.arange(5)), wanted)


class TestFit:
    @pytest.mark.parametrize("rotation", ["cayley", "exp"])
    def test_recovers_a_rotation_without_noise(self, rotation):
        old, new, y, truth = pairs(n=400)
        settings = CompatibleSettings(
            rotation=rotation, center=False, weights=(0, 1, 0), lr=3e-3, epochs=150,
            start="procrustes",
        )  # fmt: skip
        maps = fit_compatible_maps(old, new, y, settings)
        assert float((maps.backward_map.weight - truth).norm()) < 1e-3

    def test_procrustes_start_is_that_of_scipy(self):
        old, new, y, _ = pairs(noise=0.2)
        settings = CompatibleSettings(start="procrustes", epochs=0)
        maps = fit_compatible_maps(old, new, y, settings)
        r, _ = orthogonal_procrustes(maps.place_new(new).numpy(), maps.place_old(old).numpy())
        np.testing.assert_allclose(maps.backward_map.weight.numpy(), r.T, atol=1e-5)

    def test_learns_a_rotation_by_gradient_alone(self):
        old, new, y, _ = pairs(n=400, noise=0.05, seed=4)
        maps = fit_compatible_maps(old, new, y, CompatibleSettings(lr=1e-2, epochs=40))
        b, placed = maps.map_new(new), maps.place_old(old)
        found = retrieval_metrics(b, placed, y, y, exclude_self=True)["cmc1"]
        before = retrieval_metrics(maps.place_new(new), placed, y, y, exclude_self=True)["cmc1"]
        assert found > before + 0.3

    def test_a_strict_map_keeps_all_distances(self):
        old, new, y, _ = pairs(noise=0.5)
        maps = fit_compatible_maps(old, new, y, CompatibleSettings(epochs=5))
        torch.testing.assert_close(
            torch.cdist(maps.map_new(new), maps.map_new(new)),
            torch.cdist(maps.place_new(new), maps.place_new(new)),
            atol=2e-3, rtol=1e-3,
        )  # fmt: skip

    def test_lambda_bounds_the_distance(self):
        old, new, y, _ = pairs(noise=0.5)
        settings = CompatibleSettings(mode="lambda", lam=0.5, lr=1e-2, epochs=40)
        bound = fit_compatible_maps(old, new, y, settings)
        free = fit_compatible_maps(old, new, y, dataclasses.replace(settings, lam=math.inf))
        far = [float(orthogonality_distance(m.backward_map.weight)) for m in (bound, free)]
        assert far[0] < 0.75
        assert far[1] > far[0] + 0.2

    @pytest.mark.parametrize(("d", "width"), [(4, 8), (8, 4)])
    @pytest.mark.parametrize("forward", ["linear", "mlp"])
    def test_widths_may_differ(self, d, width, forward):
        new, y = draw(60, width), torch.arange(60) % 3
        old = draw(60, d, seed=1)
        settings = CompatibleSettings(epochs=2, forward=forward, start="procrustes")
        f, b = fit_compatible_maps(old, new, y, settings)(old, new)
        assert f.shape == b.shape == (60, width)

    def test_a_seed_decides_and_the_global_generator_is_left_alone(self):
        old, new, y, _ = pairs()
        state = torch.random.get_rng_state()
        first, second = (
            fit_compatible_maps(
                old, new, y, CompatibleSettings(epochs=2),
                generator=torch.Generator().manual_seed(7),
            )
            for _ in range(2)
        )  # fmt: skip
        assert torch.equal(first.map_old(old), second.map_old(old))
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_arguments_are_not_changed(self):
        old, new, y, _ = pairs()
        copies = old.clone(), new.clone()
        fit_compatible_maps(old, new, y, CompatibleSettings(epochs=1))
        assert torch.equal(old, copies[0])
        assert torch.equal(new, copies[1])

    def test_centring_stores_mean_and_mean_length(self):
        old, new, y, _ = pairs()
        maps = fit_compatible_maps(3 * old + 5, new, y, CompatibleSettings(epochs=0))
        placed = maps.place_old(3 * old + 5)
        assert float(placed.mean(0).norm()) < 1e-5
        assert float(placed.norm(dim=1).mean()) == pytest.approx(1, rel=1e-5)

    def test_progress_is_told(self):
        old, new, y, _ = pairs()
        seen = []
        settings = CompatibleSettings(epochs=3)
        fit_compatible_maps(old, new, y, settings, report=lambda part, loss: seen.append(part))
        assert seen == pytest.approx([1 / 3, 2 / 3, 1])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"new": draw(19, 8)}, "as many items"),
            ({"labels": torch.zeros(20, dtype=torch.int64)}, "at least two classes"),
            ({"old": torch.full((20, 8), math.nan)}, "old must be finite"),
            ({"old": draw(20)}, r"old must be \[items, width\]"),
            ({"old": torch.ones(20, 8)}, "all old vectors are the same"),
        ],
    )
    def test_bad_vectors(self, change, message):
        arguments = {"old": draw(20, 8), "new": draw(20, 8), "labels": torch.arange(20), **change}
        with pytest.raises(ValueError, match=message):
            fit_compatible_maps(*arguments.values())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"mode": "loose"}, "mode must be one of"),
            ({"start": "random"}, "start must be one of"),
            ({"forward": "tree"}, "forward must be one of"),
            ({"weights": (1, -1, 0)}, "three numbers from 0"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"lr": math.nan}, "lr must be positive"),
            ({"batch_size": 1}, "batch_size must be at least 2"),
            ({"epochs": -1}, "epochs must be at least 0"),
        ],
    )
    def test_bad_settings(self, change, message):
        with pytest.raises(ValueError, match=message):
            CompatibleSettings(**change)

    def test_divergence_is_said(self):
        old, new, y, _ = pairs()
        settings = CompatibleSettings(mode="lambda", lr=1e30, epochs=3)
        with pytest.raises((RuntimeError, ValueError), match=r"loss is|finite"):
            fit_compatible_maps(old, new, y, settings)

    def test_state_dict_carries_the_centring(self):
        old, new, y, _ = pairs()
        maps = fit_compatible_maps(old, new, y, CompatibleSettings(epochs=1))
        twin = CompatibleMaps(8, 8, CompatibleSettings())
        twin.load_state_dict(maps.state_dict())
        assert torch.equal(twin.map_new(new), maps.map_new(new))
