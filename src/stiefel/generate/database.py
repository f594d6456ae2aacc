"""A database of images with exact nearest-neighbour search in an encoder's space."""

from __future__ import annotations

import hashlib
from functools import cached_property
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stiefel.generate import files, search
from stiefel.generate._checks import Images, as_images, choice, rows_text, whole
from stiefel.generate.encoders import Encoder, encode, fingerprint, from_state, same_encoder

METRICS = ("cosine", "l2")
BACKENDS = ("auto", "torch", "faiss")


class ImageDatabase:
    """Images, their embeddings, and the k entries nearest to a query: ξ_k(x, D) of the paper.

    Immutable: what changes it returns another one. Search is exact and the same everywhere, see
    :mod:`stiefel.generate.search`.
    """

    def __init__(
        self,
        images: Images,
        encoder: Encoder,
        *,
        ids: Int[Tensor, " N"] | None = None,
        dtype: torch.dtype = torch.float32,
        metric: str = "cosine",
    ) -> None:
        """Encode ``images`` and keep both.

        Args:
            images: ``[N, *shape]``, floating point; models want pixels in [-1, 1].
            encoder: φ, frozen: images ``[n, *shape]`` to vectors ``[n, e]`` (more dimensions are
                flattened). What is not a :class:`DCTEncoder` or :class:`PCAEncoder` has to be
                given again when the database is loaded.
            ids: ``[N]`` whole numbers by which images are recognised and excluded; 0 to N − 1
                unless given. Images with one id are one image.
            dtype: Of the embeddings; float16 halves their memory.
            metric: ``"cosine"`` or ``"l2"``.

        Raises:
            TypeError: integer images or ids that are none.
            ValueError: no image, NaN, embeddings that are not finite or, with cosine, zero (names
                the rows), ids of another length, unknown metric.
        """
        images = as_images(images, "images")
        choice(metric, "metric", METRICS)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point, got {dtype}")
        embeddings = encode(encoder, images).to(dtype)
        self._fill(images.detach(), embeddings, encoder, ids, metric)

    def _fill(
        self,
        images: Tensor,
        embeddings: Tensor,
        encoder: Encoder,
        ids: Tensor | None,
        metric: str,
    ) -> None:
        if not len(images):
            raise ValueError("the database is empty: at least one image is needed")
        if ids is None:
            ids = torch.arange(len(images))
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be whole numbers, got {ids.dtype}")
        if ids.shape != (len(images),):
            raise ValueError(f"ids must be one for each image: {len(images)}, got {len(ids)}")
        _check_vectors(embeddings, metric, "embeddings")
        self.images = images
        self.embeddings = embeddings
        self.encoder = encoder
        self.ids = ids.long().to(embeddings.device)
        self.metric = metric

    def _like(self, images: Tensor, embeddings: Tensor, ids: Tensor) -> ImageDatabase:
        made = object.__new__(ImageDatabase)
        made._fill(images, embeddings, self.encoder, ids, self.metric)
        return made

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = "×".join(map(str, self.shape))
        return f"ImageDatabase({len(self)} images of {size}, e={self.width}, {self.metric})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self.images.shape[1:])

    @property
    def width(self) -> int:
        """Length e of an embedding."""
        return self.embeddings.shape[1]

    @cached_property
    def fingerprint(self) -> Float[Tensor, " e"]:
        """The encoder's vector of one fixed image; tells encoders apart, on any machine."""
        return fingerprint(self.encoder, self.shape)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of images, embeddings and ids."""
        sha = hashlib.sha256(repr((self.shape, self.width, self.metric)).encode())
        for part in (self.images, self.embeddings, self.ids):
            sha.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    @cached_property
    def _table(self) -> search.Table:
        return search.prepare(self.embeddings, self.metric)

    @cached_property
    def _by_id(self) -> tuple[Tensor, Tensor]:
        """The ids that there are, sorted, and how many entries have each."""
        return self.ids.unique(return_counts=True)

    def encode(self, images: Images) -> Float[Tensor, "Q e"]:
        """Vectors of images ``[Q, *shape]`` by this database's encoder.

        Raises:
            TypeError: integer images.
            ValueError: images of another shape, NaN, vectors that the metric cannot compare.
        """
        images = as_images(images, "images", shape=self.shape)
        found = encode(self.encoder, images.to(self.images)).to(self.embeddings.dtype)
        _check_vectors(found, self.metric, "embeddings")
        return found

    def search(
        self,
        queries: Float[Tensor, "Q e"],
        k: int,
        *,
        exclude_ids: Int[Tensor, " M"] | None = None,
        backend: str = "auto",
    ) -> tuple[Int[Tensor, "Q k"], Float[Tensor, "Q k"]]:
        """The k entries nearest to each query, nearest first; equals by lower row first.

        Args:
            queries: ``[Q, e]`` vectors.
            k: How many.
            exclude_ids: ``[Q]``: entries with this id are not for this query. An id that the
                database does not have excludes nothing.
            backend: Who finds the candidates; all give the same result. ``"auto"`` is
                ``"torch"``, which has been faster than faiss's flat index wherever we measured
                (``benchmarks/generate.py``).

        Returns:
            Rows ``[Q, k]`` of this database, and in the embeddings' precision their cosine
            similarities, falling, or distances, rising.

        Raises:
            TypeError: ``k`` is no whole number.
            ValueError: k < 1, more than the entries that are left, queries of another width, with
                NaN or, with cosine, zero.
            ImportError: ``backend="faiss"`` where it is not installed.
        """
        choice(backend, "backend", BACKENDS)
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ValueError(f"queries must be [Q, {self.width}], got shape {tuple(queries.shape)}")
        _check_vectors(queries, self.metric, "queries")
        k = whole(k, "k")
        excluded, lost = self._exclusion(exclude_ids, len(queries))
        if k > len(self) - lost:
            less = f", less {lost} excluded for one query" if lost else ""
            raise ValueError(f"k={k} neighbours of a database of {len(self)} images{less}")
        index, score = search.nearest(
            self._table,
            queries.detach().to(self.embeddings.device),
            k,
            excluded=excluded,
            backend="torch" if backend == "auto" else backend,
        )
        return index, score.to(self.embeddings.dtype)

    def _exclusion(self, exclude: Tensor | None, count: int):
        """What the search calls, and the most entries that one query loses."""
        if exclude is None:
            return None, 0
        if exclude.shape != (count,):
            raise ValueError(
                f"exclude_ids must be one for each query: {count}, got {tuple(exclude.shape)}"
            )
        wanted = exclude.long().to(self.ids.device)
        names, counts = self._by_id
        place = torch.searchsorted(names, wanted).clamp_max(len(names) - 1)
        hits = counts[place][names[place] == wanted]

        def excluded(index: Tensor, places: Tensor) -> Tensor:
            return self.ids[index] == wanted[places, None]

        return excluded, int(hits.max()) if len(hits) else 0

    def subset(self, mask: Tensor) -> ImageDatabase:
        """The entries where ``mask`` (``[N]`` bool) is true, or those rows, in order.

        Raises:
            ValueError: nothing is left, or a mask of another length.
            IndexError: no such row.
        """
        if mask.ndim != 1 or (mask.dtype == torch.bool and len(mask) != len(self)):
            raise ValueError(f"mask must be [{len(self)}] bool or rows, got {tuple(mask.shape)}")
        if mask.is_floating_point():
            raise TypeError(f"mask must be bool or whole numbers, got {mask.dtype}")
        mask = mask.to(self.ids.device)
        place = mask.to(self.images.device)
        return self._like(self.images[place], self.embeddings[mask], self.ids[mask])

    def concat(self, other: ImageDatabase, *, renumber: bool = False) -> ImageDatabase:
        """This database's entries, then the other's.

        Args:
            other: Of the same encoder, shape and metric.
            renumber: Give the other's entries new ids, above those here.

        Raises:
            ValueError: another encoder, shape or metric, or ids in both without ``renumber``.
        """
        self.check_same_encoder(other)
        if other.metric != self.metric:
            raise ValueError(f"other has the metric {other.metric!r}, this one {self.metric!r}")
        ids = other.ids.to(self.ids)
        if renumber:
            # Entries that are one image stay one.
            ids = ids.unique(return_inverse=True)[1] + int(self.ids.max()) + 1
        both = int(torch.isin(ids, self.ids).sum())
        if both:
            raise ValueError(f"{both} ids of other are taken: renumber=True gives it new ones")
        return self._like(
            torch.cat([self.images, other.images.to(self.images)]),
            torch.cat([self.embeddings, other.embeddings.to(self.embeddings)]),
            torch.cat([self.ids, ids]),
        )

    def check_same_encoder(self, other: ImageDatabase) -> None:
        """Raise ``ValueError`` unless ``other`` has this one's image shape and encoder."""
        if other.shape != self.shape:
            raise ValueError(f"images must be of shape {self.shape}, got {other.shape}")
        if other.width != self.width:
            raise ValueError(f"embeddings must have width {self.width}, got {other.width}")
        if not same_encoder(self.fingerprint, other.fingerprint):
            raise ValueError(
                "the database has another encoder: the same image gets different vectors. Build it "
                "with the encoder of the training, statistics included"
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write images, embeddings, ids and the encoder as one safetensors file, atomically.

        Raises:
            OSError: it cannot be written.
        """
        settings = {"metric": self.metric, "encoder": None}
        tensors = {"images": self.images, "embeddings": self.embeddings, "ids": self.ids}
        tensors["fingerprint"] = self.fingerprint
        if callable(getattr(self.encoder, "state", None)):
            settings["encoder"], found = self.encoder.state()  # pyrefly: ignore
            tensors |= {f"encoder.{name}": t for name, t in found.items()}
        files.save(Path(path), "image database", settings, tensors)

    @classmethod
    def load(cls, path: str | PathLike[str], *, encoder: Encoder | None = None) -> ImageDatabase:
        """Read what :meth:`save` wrote; nothing is encoded again.

        Args:
            path: The file.
            encoder: Needed where the encoder was a function of your own.

        Raises:
            FileNotFoundError: there is none.
            ValueError: damaged, not a database, or an encoder that is missing or not the one.
        """
        settings, tensors = files.load(Path(path), "image database")
        prefix = "encoder."
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if encoder is None:
            if settings["encoder"] is None:
                raise ValueError(
                    f"{path} was made with a function of its own as encoder: give encoder=..."
                )
            encoder = from_state(settings["encoder"], state)
        made = object.__new__(cls)
        made._fill(
            tensors["images"], tensors["embeddings"], encoder, tensors["ids"], settings["metric"]
        )
        found, expected = made.fingerprint, tensors["fingerprint"]
        if found.shape != expected.shape or not same_encoder(found, expected):
            raise ValueError(f"encoder is not the one that {path} was made with")
        return made


def _check_vectors(rows: Tensor, metric: str, name: str) -> None:
    if not rows.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {rows.dtype}")
    finite = rows.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"{name} has NaN or infinities in {rows_text(~finite)}")
    if metric == "cosine":
        zero = (rows == 0).all(1)
        if bool(zero.any()):
            raise ValueError(
                f"{name} has zero vectors, which have no direction, in {rows_text(zero)}"
            )
