"""Retrieval-augmented diffusion: a small network that composes, a database that holds the content.

Source: arXiv 2204.11824. The network sees a noisy image and the embeddings of the k database
images nearest to it; neither database, encoder nor search has a trainable parameter, so another
database makes it draw another domain, without a step of training.
"""

from __future__ import annotations

import copy
import math
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stiefel.generate import files
from stiefel.generate._checks import Images, as_images, check_range, choice, number, whole
from stiefel.generate.attention import ConditionedNetwork
from stiefel.generate.context import Asked, contexts, training_neighbours
from stiefel.generate.database import ImageDatabase
from stiefel.generate.denoiser import RetrievalDenoiser
from stiefel.generate.encoders import Encoder
from stiefel.generate.proposals import proposal_counts
from stiefel.generate.sampler import Sampler
from stiefel.generate.schedules import alpha_bars, ddim_grid
from stiefel.generate.training import Examples, Report, Settings, Training, train
from stiefel.generate.unet import RetrievalUNet

KIND = "retrieval diffusion"
NULLS = ("learned", "zeros")
NETWORKS = {"mlp": RetrievalDenoiser, "unet": RetrievalUNet}
# Images of more pixels (times channels) get the convolutional network.
FLAT_PIXELS = 256
# A level of the U-Net is added while its map keeps so many pixels a side.
SMALLEST_MAP = 8
LEVELS = (1, 2, 2)


class RetrievalDiffusion:
    """A diffusion model that draws from a swappable image database.

    >>> model = RetrievalDiffusion().fit(images, ImageDatabase(images, encoder), seed=0)
    >>> model.sample(16, generator=torch.Generator().manual_seed(0))
    """

    def __init__(
        self,
        network: ConditionedNetwork | None = None,
        *,
        schedule: str = "cosine",
        timesteps: int = 1000,
    ) -> None:
        """A model to be fitted.

        Args:
            network: Its weights are where training starts; it is not changed itself. By default a
                :class:`RetrievalDenoiser` for images of up to 256 numbers, else a
                :class:`RetrievalUNet`, of the sizes that they have by default.
            schedule: ``"cosine"`` or ``"ldm"``, see :func:`alpha_bars`.
            timesteps: T.

        Raises:
            ValueError: another schedule, or T < 2.
        """
        self.bars = alpha_bars(schedule, timesteps)
        self._start = network
        self._settings: dict[str, Any] = {"schedule": schedule, "timesteps": timesteps}
        self._network: ConditionedNetwork | None = None
        self._database: ImageDatabase | None = None
        self._counts: Tensor | None = None
        self.losses = torch.zeros(0)
        """Loss of each step of the training, a pixel."""

    @property
    def network(self) -> ConditionedNetwork:
        """The trained network.

        Raises:
            RuntimeError: not fitted.
        """
        if self._network is None:
            raise RuntimeError("this RetrievalDiffusion is not fitted: call fit or load first")
        return self._network

    @property
    def database(self) -> ImageDatabase:
        """What it draws from.

        Raises:
            RuntimeError: not fitted.
        """
        if self._database is None:
            raise RuntimeError("this RetrievalDiffusion is not fitted: call fit or load first")
        return self._database

    @property
    def k(self) -> int:
        """Neighbours an image had in training."""
        return self._settings["k"]

    @property
    def prediction(self) -> str:
        """What the network predicts: ``"x0"``, ``"eps"`` or ``"v"``."""
        return self._settings["prediction"]

    @property
    def counts(self) -> Int[Tensor, " N"]:
        """How often each entry was a neighbour, :func:`proposal_counts`.

        Of the training images; after a swap of the new database's own images, each without itself.
        """
        if self._counts is None:
            db = self.database
            found, _ = db.search(db.embeddings, self.k, exclude_ids=db.ids)
            self._counts = proposal_counts(found, len(db))
        return self._counts

    def fit(
        self,
        X: Images,
        database: ImageDatabase,
        *,
        k: int = 4,
        steps: int = 1200,
        p_uncond: float | int = 0.1,
        prediction: str = "x0",
        min_snr: float | int = 5.0,
        seed: int = 0,
        batch_size: int = 128,
        lr: float | int = 2e-3,
        ids: Int[Tensor, " M"] | None = None,
        neighbours: Int[Tensor, "M n"] | None = None,
        checkpoint: str | PathLike[str] | None = None,
        checkpoint_every: int = 200,
        progress: Report | None = None,
    ) -> RetrievalDiffusion:
        """Train on images X, whose neighbours are looked up once, before the first step.

        AdamW, 50 steps of warm-up, cosine to 5 %, averaged weights. x0 is weighted by min(SNR,
        ``min_snr``); eps and v are not, as in the paper. Random numbers come from ``seed`` alone.

        Args:
            X: ``[M, *shape]`` floating point in [−1, 1], of the database's shape.
            database: What the neighbours are taken from.
            k: Neighbours an image sees.
            steps: Of the optimizer.
            p_uncond: Share of images that see the null context instead; 1 trains the network of
                the same size without retrieval.
            prediction: What the network predicts, ``"x0"``, ``"eps"`` or ``"v"``.
            min_snr: γ, for x0.
            seed: Of weights (where no network was given), batches and noise.
            batch_size: Images a step.
            lr: Largest rate.
            ids: ``[M]``: an image is not its own neighbour: entries of its id are left out. Where
                X is the database's images, its ids are taken.
            neighbours: ``[M, k]`` rows of the database to use instead of the nearest.
            checkpoint: File to go on from if it is there, written every ``checkpoint_every`` steps
                and at the end. The result is that of an uninterrupted training, bit for bit.
            checkpoint_every: Steps.
            progress: Called with the fraction done and a word on the loss.

        Returns:
            Itself.

        Raises:
            TypeError: integer images; tells how to scale.
            ValueError: another shape than the database's, pixels out of range, NaN, more
                neighbours than there are, settings out of range, a checkpoint of other settings.
            FloatingPointError: the loss is not finite any more.
        """
        settings = Settings(steps, batch_size, float(lr), float(p_uncond), prediction,
                            float(min_snr), seed)  # fmt: skip
        X = as_images(X, "X", shape=database.shape).detach()
        check_range(X, "X")
        check_range(database.images, "database.images")
        table = training_neighbours(X, database, k, ids, neighbours)
        network = self._new_network(database, seed)
        weights = network.null
        examples = Examples(
            X.to(weights).reshape(len(X), *network.input_shape),
            database.embeddings.to(weights.device),
            table.to(weights.device, torch.int32),
        )
        training = Training(network, examples, self.bars, settings)
        path = None if checkpoint is None else Path(checkpoint)
        train(training, checkpoint=path, every=checkpoint_every, progress=progress)
        self._network, self._database = network, database
        self._counts = proposal_counts(table, len(database)).cpu()
        self.losses = training.losses
        self._settings |= {"k": table.shape[1], "prediction": prediction}
        return self

    def _new_network(self, database: ImageDatabase, seed: int) -> ConditionedNetwork:
        shape, width = database.shape, database.width
        if self._start is not None:
            network = copy.deepcopy(self._start)
            if math.prod(network.input_shape) != math.prod(shape):
                raise ValueError(
                    f"network takes images of shape {network.input_shape}, the database has {shape}"
                )
            if network.context_width != width:
                raise ValueError(
                    f"network takes embeddings of width {network.context_width}, the database has "
                    f"{width}"
                )
            return network
        generator = torch.Generator().manual_seed(seed)
        if math.prod(shape) <= FLAT_PIXELS or len(shape) not in (2, 3):
            return RetrievalDenoiser(math.prod(shape), width, generator=generator)
        sides = shape if len(shape) == 3 else (1, *shape)
        levels = 1
        while levels < len(LEVELS) and all(
            s % 2**levels == 0 and s // 2**levels >= SMALLEST_MAP for s in sides[1:]
        ):
            levels += 1
        return RetrievalUNet(sides, width, multipliers=LEVELS[:levels], generator=generator)

    def swap_database(self, db: ImageDatabase) -> RetrievalDiffusion:
        """A model with the same weights that draws from ``db``; this one stays as it is.

        Raises:
            RuntimeError: not fitted.
            ValueError: images of another shape, embeddings of another width, or another encoder
                (its statistics are part of it).
        """
        self.database.check_same_encoder(db)
        other = copy.copy(self)
        other._settings = dict(self._settings)
        other._database, other._counts = db, None
        return other

    def sample(
        self,
        n: int,
        *,
        database: ImageDatabase | None = None,
        query: Images | None = None,
        query_embedding: Float[Tensor, "*Q e"] | None = None,
        entries: Int[Tensor, " n"] | None = None,
        include_query: bool = True,
        k: int | None = None,
        top_m: float | int = 1.0,
        weights: bool = False,
        guidance: float | int = 1.0,
        conditional: bool = True,
        steps: int = 50,
        null: str = "learned",
        grid: str = "linspace",
        generator: torch.Generator | None = None,
        return_neighbours: bool = False,
        batch_size: int = 256,
        progress: Report | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw n images by DDIM (η = 0).

        All random numbers are drawn before the first step: the samples of a seed do not depend on
        ``batch_size``, up to rounding of matrix products.

        Args:
            n: How many.
            database: Draw from this one, as after :meth:`swap_database`.
            query: ``[*shape]`` or ``[Q, *shape]`` images to resemble, in turn. Without queries,
                entries of the database stand in.
            query_embedding: ``[e]`` or ``[Q, e]``, in place of ``query``: of a text, for one.
            entries: ``[n]`` rows that stand in, instead of drawing them.
            include_query: The context is the query, or the stand-in, and its k − 1 nearest other
                entries; else its k nearest.
            k: Rows of a context, by default as in training. More: more varied, more blurred.
            top_m, weights: Who may stand in; see :func:`stiefel.generate.top_m`.
            guidance: s ≥ 1 in ε_∅ + s (ε_c − ε_∅); 1 costs one pass instead of two.
            conditional: False for samples from the null context alone.
            steps: Of DDIM.
            null: ``"learned"``, or ``"zeros"`` as the authors' code has it.
            grid: ``"linspace"`` or ``"ldm"``, see :func:`ddim_grid`.
            generator: Of all random numbers, on the CPU; PyTorch's own by default.
            return_neighbours: Return also ``[n, k]`` rows of the database, −1 for a query.
            batch_size: Images at a time.
            progress: Called with the fraction done.

        Returns:
            ``[n, *shape]``, or that and the neighbours.

        Raises:
            RuntimeError: not fitted.
            TypeError: integer query images, or numbers of another kind.
            ValueError: guidance < 1, more neighbours than entries, a database of another encoder,
                queries of another shape, or other settings out of range.
            ImportError: diffusers is not installed; names the extra.
            FloatingPointError: a sample is not finite.
        """
        model = self if database is None else self.swap_database(database)
        n, batch_size = whole(n, "n"), whole(batch_size, "batch_size")
        number(guidance, "guidance", least=1.0)
        choice(null, "null", NULLS)
        times = ddim_grid(self.bars, steps, grid)
        like = self.network.null.detach()
        asked = Asked(query, query_embedding, entries, include_query, top_m, weights)
        chosen = contexts(model, n, self.k if k is None else k, asked, generator)
        noise = torch.randn(n, *self.network.input_shape, generator=generator, dtype=like.dtype)
        scale = float(guidance) if conditional else 0.0
        sampler = Sampler(self.network, times, self.prediction, chosen, scale, null)
        parts = []
        for start in range(0, n, batch_size):
            rows = slice(start, start + batch_size)
            parts.append(sampler(noise[rows].to(like.device), rows))
            if progress is not None:
                progress(min(1.0, (start + batch_size) / n), "")
        images = torch.cat(parts).reshape(n, *model.database.shape)
        finite = images.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            raise FloatingPointError(f"{int((~finite).sum())} samples are NaN or infinite")
        return (images, chosen.rows) if return_neighbours else images

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model to ``path``, and its database beside it, both as safetensors.

        The database's file is named by its content, and the model's names it: whenever a run is
        killed, ``path`` is the old model with its database or the new one with its own.

        Raises:
            RuntimeError: not fitted.
            ValueError: a network of a class of your own.
            OSError: it cannot be written.
        """
        path = Path(path)
        network, db = self.network, self.database
        if network.settings.get("kind") not in NETWORKS:
            raise ValueError(f"cannot save a network of the class {type(network).__name__}")
        beside = path.with_name(f"{path.stem}.database-{db.digest[:12]}.safetensors")
        before = _database_of(path)
        db.save(beside)
        settings = {
            **self._settings,
            "network": network.settings,
            "database": beside.name,
            "digest": db.digest,
        }
        tensors = {f"network.{name}": t for name, t in network.state_dict().items()}
        files.save(path, KIND, settings, {**tensors, "counts": self.counts})
        if before is not None and before != beside:
            before.unlink(missing_ok=True)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        encoder: Encoder | None = None,
        database: ImageDatabase | None = None,
    ) -> RetrievalDiffusion:
        """Read what :meth:`save` wrote.

        Args:
            path: The model's file; its database lies beside it.
            encoder: Needed where the database's was a function of your own.
            database: Draw from this one; the file beside the model still tells which encoder.

        Raises:
            FileNotFoundError: no such file, or no database beside it.
            ValueError: damaged, not a model, or a database that is not its own.
        """
        path = Path(path)
        settings, tensors = files.load(path, KIND)
        beside = path.with_name(Path(settings["database"]).name)
        if not beside.is_file():
            raise FileNotFoundError(f"{path} needs its database {beside.name} beside it")
        db = ImageDatabase.load(beside, encoder=encoder)
        if db.digest != settings["digest"]:
            raise ValueError(f"{beside} is not the database that {path} was saved with")
        model = cls(schedule=settings["schedule"], timesteps=settings["timesteps"])
        sizes = dict(settings["network"])
        network = NETWORKS[sizes.pop("kind")](**sizes)
        prefix = "network."
        network.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        weights = tensors[f"{prefix}null"]
        model._network = network.to(weights.dtype).eval()
        model._start = model._network
        model._database, model._counts = db, tensors["counts"]
        model._settings |= {"k": settings["k"], "prediction": settings["prediction"]}
        return model if database is None else model.swap_database(database)


def _database_of(path: Path) -> Path | None:
    """The database file that a model at ``path`` names, if there is such a model."""
    try:
        settings, _ = files.load(path, KIND)
    except (FileNotFoundError, ValueError):  # none, or none of ours: nothing to clean up
        return None
    return path.with_name(Path(settings["database"]).name)
