"""What PTD is measured by: transfer functions, features under noise, a trained layer under noise.

Every start is run as the real dense system that it diagonalises, x' = A x + B u, so that the three
are compared in one basis and HiPPO itself, which has no usable eigenvectors, can take part.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.linalg import fourier_noise, hippo_ptd, legs_transfer, ptd_diagonalize
from stiefel.linalg.hippo import hippo_legs, legs_normal, transfer_function
from stiefel.nn.s4d import seeded_linear
from stiefel.papers.paper import UnavailableError
from stiefel.papers.sequence_digits import VARIABLE, Report, Split, cifar10, digits

# The three that are compared: HiPPO itself (what S4 runs), its normal part, HiPPO perturbed.
STARTS = ("hippo", "s4d", "ptd")
# Other perturbations of HiPPO: name → settings of ptd_diagonalize.
VARIANTS: dict[str, dict[str, Any]] = {
    "optimize 1000": {"method": "optimize", "gamma": 1e3, "low_rank": "legs"},
    "optimize 100": {"method": "optimize", "gamma": 1e2, "low_rank": "legs"},
    "random 1e-3": {"method": "random", "rel": 1e-3},
    "structured 0.5": {"method": "structured", "t": 0.5, "low_rank": "legs"},
}
CURVE_POINTS = 400


def system(name: str, n: int, t: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A ``[n, n]`` and B ``[n]`` of a start, float64, real."""
    a, b = hippo_legs(n)
    part = torch.outer(b, b) / 2
    if name == "hippo":
        return a, b
    if name == "s4d":
        return a + part, b / 2
    if name == "ptd":
        return a + t * part, (1 - t / 2) * b
    settings = dict(VARIANTS[name])
    generator = torch.Generator().manual_seed(seed)
    e = ptd_diagonalize(a, generator=generator, **settings).E
    return a + e, (1 - settings["t"] / 2) * b if "t" in settings else b


def transfer_errors(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """sup |G(iω) - 1/(1 + iω)| of S4D-LegS and PTD, over all frequencies and over a band.

    The diagonalised systems themselves, on a grid that holds every eigenfrequency; and their
    largest distance from the closed form. The curves are those of the order ``config["curve"]``.
    """
    result: dict[str, Any] = {"difference": 0.0}
    for key in ("s4d", "ptd", "s4d band", "ptd band"):
        result[key] = []
    for done, n in enumerate(config["orders"]):
        spectrum, v, _ = legs_normal(n)
        inputs = v.mH @ (hippo_legs(n)[1] / 2).to(v.dtype)
        lam, b, basis, weights = hippo_ptd(n, t=config["t"])
        starts = {
            "s4d": (1.0, spectrum, inputs, v[0].clone(), torch.ones(n, dtype=torch.float64)),
            "ptd": (config["t"], lam, b, basis[0].clone(), weights),
        }
        resonances = torch.cat([spectrum.imag[spectrum.imag > 0], lam.imag])
        wide = torch.logspace(-3, math.log10(3 * n**2), config["points"], dtype=torch.float64)
        band = torch.linspace(0, config["band"], config["points"], dtype=torch.float64)
        for name, (t, *diagonal) in starts.items():
            a, b_t, c, w = diagonal
            for key, omega in ((name, torch.cat([resonances, wide])), (f"{name} band", band)):
                found = transfer_function(a, b_t, c, omega, w)
                exact = 1 / (1 + 1j * omega)
                result[key].append(float((found - exact).abs().max()))
                off = (found - legs_transfer(n, omega, t)).abs().max()
                result["difference"] = max(result["difference"], float(off))
            if n == config["curve"]:
                omega = _curve(resonances, n)
                exact = 1 / (1 + 1j * omega)
                g, theory = transfer_function(a, b_t, c, omega, w), legs_transfer(n, omega, t)
                result["omega"] = omega.tolist()
                result[f"{name} curve"] = (g - exact).abs().tolist()
                result[f"{name} theory"] = (theory - exact).abs().tolist()
        report((done + 1) / len(config["orders"]), f"order {n}")
    return result


def _curve(resonances: Tensor, n: int) -> Tensor:
    """Frequencies to draw: evenly in the logarithm, and every resonance."""
    grid = torch.logspace(0, math.log10(2 * n**2), CURVE_POINTS, dtype=torch.float64)
    return torch.cat([grid, resonances[resonances >= 1]]).sort().values


def variants(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Every perturbation: κ, ‖E‖/‖A‖, largest Re λ, sup |G(iω) - 1/(1 + iω)|."""
    n = config["order"]
    result: dict[str, Any] = {}
    a, b = hippo_legs(n)
    every: dict[str, dict[str, Any]] = {
        "structured 0.1": {"low_rank": "legs", "t": config["t"]},
        **VARIANTS,
    }
    for done, (name, settings) in enumerate(every.items()):
        generator = torch.Generator().manual_seed(config["split"])
        found = ptd_diagonalize(a, generator=generator, **settings)
        scale = 1 - settings["t"] / 2 if "t" in settings else 1.0
        inputs = found.V_inv @ (scale * b).to(found.V.dtype)
        omega = torch.logspace(-3, math.log10(3 * n**2), config["points"], dtype=torch.float64)
        omega = torch.cat([omega, found.eigenvalues.imag.abs()])
        ones = torch.ones_like(found.weights)
        g = transfer_function(found.eigenvalues, inputs, found.V[0].clone(), omega, ones)
        result[name] = {
            "kappa": found.kappa,
            "backward error": found.backward_error,
            "rightmost": float(found.eigenvalues.real.max()),
            "transfer error": float((g - 1 / (1 + 1j * omega)).abs().max()),
        }
        report((done + 1) / len(every), name)
    return result


def basis(a: Tensor, b: Tensor, dt: float, steps: int) -> Tensor:
    """States after an impulse, ``[steps, n]``: Ā^l B̄ under zero-order hold, float64.

    Ā = exp(A dt) and B̄ = A⁻¹ (Ā - 1) B from one matrix exponential; no eigenvectors.
    """
    n = len(b)
    joint = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    joint[:n, :n], joint[:n, n] = a * dt, b * dt
    joint = torch.linalg.matrix_exp(joint)
    states = [joint[:n, n]]
    for _ in range(steps - 1):
        states.append(joint[:n, :n] @ states[-1])
    return torch.stack(states)


def sequences(config: Mapping[str, Any]) -> tuple[Split, str]:
    """The real sequences ``[n, length, channels]`` in [-1, 1], digits enlarged if asked for."""
    if config["data"] == "cifar10":
        return cifar10(Path(os.environ[VARIABLE]))
    (x, y, test_x, test_y), checksum = digits(config["split"])
    side = config["side"]

    def enlarged(pixels: Tensor) -> Tensor:
        images = pixels.reshape(-1, 1, 8, 8)
        images = nn.functional.interpolate(images, (side, side), mode="bilinear")
        return images.reshape(-1, side * side, 1)

    return (enlarged(x), y, enlarged(test_x), test_y), checksum


def feature_accuracies(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Accuracy of a linear classifier on the state at the end of each sequence, by start and noise.

    The classifier is fitted on clean sequences; test sequences are clean, or get a sinusoid of
    random phase at ``config["theta"]`` radians a step (amplitudes .1 and .2), at 0.9 of that (.2),
    white noise (standard deviation .2), or a sinusoid (.1) anywhere in ``config["sweep"]``.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise UnavailableError(
            "the features are classified with scikit-learn: pip install 'stiefel[atlas]'"
        ) from error
    (x, y, test_x, test_y), checksum = sequences(config)
    x, test_x = x.double(), test_x.double()
    theta = config["theta"]
    result: dict[str, Any] = {"sha256": checksum}
    names = (*STARTS, *VARIANTS)
    for done, name in enumerate(names):
        a, b = system(name, config["order"], config["t"], config["split"])
        kernel = basis(a, b, config["dt"], x.shape[1]).flip(0)

        def features(u: Tensor, kernel: Tensor = kernel) -> Any:
            return torch.einsum("blc,ln->bcn", u, kernel).flatten(1).numpy()

        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(features(x), y.numpy())
        # Every start meets the same noise.
        generator = torch.Generator().manual_seed(config["split"])
        noise = torch.randn(test_x.shape, generator=generator, dtype=test_x.dtype)

        def noisy(frequency: float, amplitude: float, generator: Any = generator) -> Tensor:
            return fourier_noise(test_x, frequency, amplitude, generator, dim=1)

        tests = {
            "clean": test_x,
            "spike": noisy(theta, 0.1),
            "spike twice": noisy(theta, 0.2),
            "beside": noisy(0.9 * theta, 0.2),
            "white": test_x + 0.2 * noise,
        }
        scores: dict[str, Any] = {
            k: float(classifier.score(features(u), test_y)) for k, u in tests.items()
        }
        if name in STARTS:
            sweep = [
                float(classifier.score(features(noisy(f, 0.1)), test_y)) for f in config["sweep"]
            ]
            scores["sweep"] = sweep
        result[name] = scores
        report((done + 1) / len(names), f"{name} {scores['spike']:.2f}")
    return result


class FrozenBasis(nn.Module):
    """A sequence layer whose states are those of a given system; what it reads of them is trained.

        y = u + GLU(Linear(gelu(K * z + D z))),   K[h, l] = Σ_n C[h, n] x_n(l)

    with z = u, or z = LayerNorm(u) if ``norm``.
    """

    def __init__(self, states: Tensor, width: int, generator: torch.Generator, norm: bool) -> None:
        super().__init__()
        self.states: Tensor
        self.register_buffer("states", states.float())
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.C = nn.Parameter(torch.randn(width, states.shape[1], generator=generator))
        self.D = nn.Parameter(torch.randn(width, generator=generator))
        self.output = seeded_linear(width, 2 * width, generator)

    def forward(self, u: Tensor) -> Tensor:
        """``[batch, length, width]`` of the same."""
        z, length = self.norm(u), u.shape[1]
        kernel = torch.fft.rfft(self.C @ self.states.mT, n=2 * length)
        signal = torch.fft.rfft(z.mT, n=2 * length)
        y = torch.fft.irfft(signal * kernel, n=2 * length)[..., :length].mT + self.D * z
        return u + nn.functional.glu(self.output(nn.functional.gelu(y)), dim=-1)


def build(config: Mapping[str, Any], channels: int, length: int, seed: int) -> nn.Module:
    """Linear map, layers on the basis of ``config["start"]``; weights drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    a, b = system(config["start"], config["order"], config["t"])
    states = basis(a, b, config["dt"], length)
    width = config["width"]
    return nn.Sequential(
        seeded_linear(channels, width, generator),
        *(FrozenBasis(states, width, generator, config["norm"]) for _ in range(config["layers"])),
        _Mean(),
        seeded_linear(width, 10, generator),
    )


class _Mean(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return u.mean(1)


def train(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train on clean sequences; test accuracy clean and with a sinusoid at ``config["theta"]``."""
    (x, y, test_x, test_y), checksum = sequences(config)
    x, y = x[: config["train"]], y[: config["train"]]
    seed = 1000 * config["split"] + config["repeat"]
    model = build(config, x.shape[2], x.shape[1], seed).to(config["device"])
    optimizer = torch.optim.AdamW(model.parameters(), config["lr"], weight_decay=config["decay"])
    batches = -(-len(x) // config["batch"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"] * batches)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(config["epochs"]):
        total = 0.0
        for index in torch.randperm(len(x), generator=generator).split(config["batch"]):
            inputs, targets = (part[index].to(config["device"]) for part in (x, y))
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        losses.append(total / len(x))
        report((epoch + 1) / config["epochs"], f"{config['start']} loss {losses[-1]:.2f}")
    # The same phases for every start.
    generator = torch.Generator().manual_seed(config["split"])
    noisy = fourier_noise(test_x, config["theta"], config["amplitude"], generator, dim=1)
    result: dict[str, Any] = {"losses": losses, "sha256": checksum}
    for name, u in (("clean", test_x), ("spike", noisy)):
        right = 0
        with torch.no_grad():
            for inputs, targets in zip(u.split(250), test_y.split(250), strict=True):
                found = model(inputs.to(config["device"])).argmax(1).cpu()
                right += int((found == targets).sum())
        result[name] = right / len(test_y)
    return result
