"""The experiments behind the card of the online dictionary: synthetic codes, patches, digits.

Photographs and digits come with scikit-learn; the sensors of the paper scale are the Intel Berkeley
lab's, read from ``intel-lab/data.txt`` in ``STIEFEL_DATA``.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stiefel.data import MissingDataError, photograph, table
from stiefel.linalg import dct_matrix, haar, polar
from stiefel.numerics import (
    frank_wolfe_gap,
    fw_step,
    keep_largest,
    power_gradient,
    recovery_error,
    start_dictionary,
)
from stiefel.papers.paper import UnavailableError

Report = Callable[[float, str], None]

VARIABLE, SENSOR_FILE = "STIEFEL_DATA", "intel-lab/data.txt"
KEPT = (2, 4, 8, 16)
SIDE = 8
# Readings of a mote whose battery dies drift to 122 °C.
LEAST_CELSIUS, MOST_CELSIUS = -10.0, 60.0


def sparse_batch(d: Tensor, theta: float, count: int, generator: torch.Generator) -> Tensor:
    """y = D x as columns; entries of x are N(0, 1) with probability ``theta``, else 0."""
    shape = (d.shape[0], count)
    values = torch.randn(shape, generator=generator, dtype=d.dtype)
    return d @ (values * (torch.rand(shape, generator=generator, dtype=d.dtype) < theta))


def logged(first: int, last: int, count: int = 24) -> list[int]:
    """Steps at even distances on a logarithmic scale, both ends among them."""
    return sorted({round(first * (last / first) ** (i / (count - 1))) for i in range(count)})


def recover(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Learn a random dictionary from noiseless sparse samples: recovery error against steps."""
    generator = torch.Generator().manual_seed(config["seed"])
    d = haar(config["n"], generator=generator, dtype=torch.float64)
    state = start_dictionary(config["n"], generator=generator)
    steps, marks = config["steps"], set(logged(10, config["steps"]))
    course: dict[str, Any] = {"steps": sorted(marks), "error": []}
    for t in range(1, steps + 1):
        y = sparse_batch(d, config["theta"], config["batch"], generator)
        state = fw_step(state, y, config["p"], **config["powers"])
        if t in marks:
            course["error"].append(float(recovery_error(state.A, d)))
    report(1.0, f"recovery error {course['error'][-1]:.2g}")
    return course


def gaps(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Frank–Wolfe gap on samples that the method does not see, against steps."""
    generator = torch.Generator().manual_seed(config["seed"])
    d = haar(config["n"], generator=generator, dtype=torch.float64)
    unseen = sparse_batch(d, config["theta"], config["unseen"], generator)
    state = start_dictionary(config["n"], generator=generator)
    marks = logged(config["first"], config["steps"])
    course: dict[str, Any] = {"steps": marks, "gap": []}
    for t in range(1, config["steps"] + 1):
        y = sparse_batch(d, config["theta"], config["batch"], generator)
        state = fw_step(state, y, config["p"])
        if t in marks:
            course["gap"].append(float(frank_wolfe_gap(state.A, unseen, config["p"])))
    report(1.0, f"gap {course['gap'][-1]:.2g}")
    return course


def square_dct() -> np.ndarray:
    """The two-dimensional DCT of 8 × 8 pixels, ``[64, 64]``, rows = atoms."""
    one = dct_matrix(SIDE, dtype=torch.float64)
    return torch.kron(one, one).numpy()


def principal(x: np.ndarray) -> np.ndarray:
    """Principal axes of samples without mean, as rows."""
    return np.linalg.eigh(x.T @ x)[1].T[::-1].copy()


def offline(x: np.ndarray, p: int, steps: int, seed: int) -> np.ndarray:
    """The whole data in every step: A ← polar(∇F(A)), from a random start; rows = atoms."""
    generator = torch.Generator().manual_seed(seed)
    a, y = haar(x.shape[1], generator=generator, dtype=torch.float64), torch.from_numpy(x.T.copy())
    for _ in range(steps):
        a = polar(power_gradient(a, y, p))
    return a.numpy()


def squared_error(atoms: np.ndarray, x: np.ndarray) -> list[float]:
    """Σ of squares that the k largest coefficients of an orthogonal basis leave out, per k."""
    codes = x @ atoms.T
    return [float(np.square(codes - keep_largest(codes, k)).sum()) for k in KEPT]


def patches(count: int, left: bool, seed: int) -> tuple[np.ndarray, str]:
    """``[count, 64]``: random 8 × 8 patches of both photographs, without their means.

    Grey in [0, 1].

    Args:
        count: half from each photograph.
        left: from the left halves, else from the right.
        seed: of the choice and the order.

    Returns:
        The patches, and a checksum of the pixels.

    Raises:
        UnavailableError: scikit-learn or Pillow is not installed.
    """
    rng = np.random.default_rng([seed, int(left)])
    found, digest = [], hashlib.sha256()
    for name in ("china", "flower"):
        try:
            picture = photograph(name)
        except MissingDataError as error:
            raise UnavailableError(str(error)) from error
        digest.update(picture.sha256.encode())
        grey = picture.pixels.double().mean(-1).numpy() / 255
        half = grey.shape[1] // 2
        grey = grey[:, :half] if left else grey[:, half:]
        windows = np.lib.stride_tricks.sliding_window_view(grey, (SIDE, SIDE))
        rows, columns = windows.shape[:2]
        chosen = rng.choice(rows * columns, count // 2, replace=False)
        found.append(windows[chosen // columns, chosen % columns].reshape(-1, SIDE**2))
    x = rng.permutation(np.concatenate(found))
    return x - x.mean(1, keepdims=True), digest.hexdigest()


def photographs(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """PSNR of unseen patches by coefficients kept, for every basis; times beside scikit-learn's."""
    from sklearn.decomposition import MiniBatchDictionaryLearning

    from stiefel.numerics import OnlineOrthogonalDictionary

    seed, batch = config["seed"], config["batch"]
    x, checksum = patches(config["train"], True, seed)
    test, _ = patches(config["test"], False, seed)
    generator = torch.Generator().manual_seed(seed)
    bases = {
        "random": haar(SIDE**2, generator=generator, dtype=torch.float64).numpy(),
        "pca": principal(x),
        "dct": square_dct(),
        "offline": offline(x, 4, config["offline"], seed),
    }
    report(0.3, "")
    for p, start in ((3, 0), *((4, start) for start in range(config["starts"]))):
        learner = OnlineOrthogonalDictionary(
            p=p, batch_size=batch, random_state=1000 * seed + start
        )
        bases[f"online {p} {start}"] = learner.fit(x).components_
    report(0.5, "")
    psnr = {
        name: [decibels(e / test.size) for e in squared_error(atoms, test)]
        for name, atoms in bases.items()
    }
    psnr["online 3"] = psnr.pop("online 3 0")
    each = [psnr.pop(f"online 4 {start}") for start in range(config["starts"])]
    psnr["online 4"] = [fmean(values) for values in zip(*each, strict=True)]
    part = x[: config["peer"]]
    ours = OnlineOrthogonalDictionary(p=4, batch_size=batch, random_state=seed)
    peer = MiniBatchDictionaryLearning(
        SIDE**2, alpha=0.1, batch_size=batch, max_iter=1, max_no_improvement=None, tol=0.0,
        random_state=seed, transform_algorithm="omp",
    )  # fmt: skip
    seconds = {"ours": clocked(lambda: ours.fit(part)), "peer": clocked(lambda: peer.fit(part))}
    few, psnr["peer"] = test[: config["encoded"]], []
    with warnings.catch_warnings():
        # Orthogonal matching pursuit says so when it needs fewer coefficients than allowed.
        warnings.simplefilter("ignore", RuntimeWarning)
        for k in KEPT:
            codes = peer.set_params(transform_n_nonzero_coefs=k).transform(few)
            rest = few - codes @ peer.components_
            psnr["peer"].append(decibels(float(np.square(rest).mean())))
            if k == 4:
                ours.set_params(n_nonzero=k)
                times = {"ours": [], "peer": []}
                for _ in range(3):
                    times["ours"].append(clocked(lambda: ours.transform(few)))
                    times["peer"].append(clocked(lambda: peer.transform(few)))
                seconds |= {f"encode {name}": min(values) for name, values in times.items()}
    report(1.0, f"PSNR {psnr['online 4'][0]:.2f} dB")
    return {"psnr": psnr, "seconds": seconds, "sha256": checksum}


def decibels(mean_square: float) -> float:
    """PSNR for a peak of 1."""
    return float(-10 * np.log10(mean_square))


def clocked(task: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    start = time.thread_time()
    task()
    return time.thread_time() - start


def digits(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Relative squared error of unseen digits by coefficients kept, over splits and starts."""
    from stiefel.numerics import OnlineOrthogonalDictionary

    try:
        content = table("digits")
    except MissingDataError as error:
        raise UnavailableError(str(error)) from error
    x = content.x.numpy()
    x = x - x.mean(1, keepdims=True)
    errors: dict[str, list[list[float]]] = {}
    for repeat in range(config["repeats"]):
        seed = 1000 * config["seed"] + repeat
        order = np.random.default_rng(seed).permutation(len(x))
        train, test = np.split(x[order], [len(x) * 4 // 5])
        bases = {"dct": square_dct(), "pca": principal(train), "pixels": np.eye(SIDE**2)}
        runs = [(4, config["epochs"])]
        if repeat < config["others"]:
            runs += [(3, config["epochs"]), (4, 4 * config["epochs"])]
        for p, epochs in runs:
            learner = OnlineOrthogonalDictionary(
                p=p, batch_size=config["batch"], n_epochs=epochs, random_state=seed
            )
            name = f"online {p}" if epochs == config["epochs"] else "online 4 long"
            bases[name] = learner.fit(train).components_
        bases["offline"] = offline(train, 4, config["offline"], seed)
        total = float(np.square(test).sum())
        for name, atoms in bases.items():
            found = [e / total for e in squared_error(atoms, test)]
            errors.setdefault(name, []).append(found)
        report((repeat + 1) / config["repeats"], f"error {errors['online 4'][-1][0]:.3f}")
    means = {n: [fmean(v) for v in zip(*rows, strict=True)] for n, rows in errors.items()}
    twos = [row[0] for row in errors["online 4"]]
    return {"error": means, "online 4 each": twos, "sha256": content.sha256}


def sensor_file() -> Path:
    """Where the sensors' readings are.

    Raises:
        UnavailableError: the variable is not set or the file is not there.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise UnavailableError(
            f"the paper scale needs the Intel Berkeley lab's sensor readings: "
            f"set {VARIABLE} to a folder with {SENSOR_FILE}"
        )
    path = Path(folder) / SENSOR_FILE
    if not path.is_file():
        raise UnavailableError(f"the paper scale needs {path}")
    return path


def sensor_windows(path: Path, length: int = SIDE**2) -> np.ndarray:
    """``[windows, length]``: consecutive temperatures of one mote each, °C, in order of epochs.

    Lines are date, time, epoch, mote, temperature, humidity, light, voltage; incomplete lines and
    temperatures of dying motes are left out, as the lab's page advises.

    Raises:
        ValueError: no mote has enough readings.
    """
    readings: dict[int, list[tuple[int, float]]] = {}
    with path.open(encoding="ascii") as lines:
        for line in lines:
            fields = line.split()
            if len(fields) != 8:
                continue
            celsius = float(fields[4])
            if LEAST_CELSIUS <= celsius <= MOST_CELSIUS:
                readings.setdefault(int(fields[3]), []).append((int(fields[2]), celsius))
    windows = []
    for mote in sorted(readings):
        values = np.array([celsius for _, celsius in sorted(readings[mote])])
        count = len(values) // length
        windows.append(values[: count * length].reshape(count, length))
    found = np.concatenate(windows) if windows else np.empty((0, length))
    if not len(found):
        raise ValueError(f"{path} holds no mote with {length} readings")
    return found


def sensors(config: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Relative squared error of unseen windows; learned in one pass from four fifths of all."""
    from stiefel.numerics import OnlineOrthogonalDictionary

    path = sensor_file()
    x = sensor_windows(path)
    x = np.random.default_rng(config["seed"]).permutation(x - x.mean(1, keepdims=True))
    train, test = np.split(x, [len(x) * 4 // 5])
    learner = OnlineOrthogonalDictionary(
        p=4, batch_size=config["batch"], random_state=config["seed"]
    )
    bases = {
        "dct": dct_matrix(x.shape[1], dtype=torch.float64).numpy(),
        "pca": principal(train),
        "online 4": learner.fit(train).components_,
    }
    total = float(np.square(test).sum())
    error = {name: [e / total for e in squared_error(a, test)] for name, a in bases.items()}
    report(1.0, f"error {error['online 4'][0]:.3g}")
    return {"error": error, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
