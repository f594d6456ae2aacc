"""OrthoReg: a penalty that keeps the change of every layer close to orthonormal columns.

After Liu et al., "Understanding and Enforcing Weight Disentanglement in Task Arithmetic"
(arXiv 2604.17078). Fine-tunes that were trained with it interfere less when their task vectors are
added or subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stiefel.linalg._checks import compute_dtype
from stiefel.linalg.autocast import without_autocast
from stiefel.regularize.orthoreg_layers import (
    DenseUpdate,
    LowRankUpdate,
    Update,
    find_updates,
    is_sharded,
)
from stiefel.regularize.orthoreg_loss import check_options, distance, lowrank_distance

# Entries up to which matrices of one shape are computed together: a single product of many small
# ones saves launches, of large ones it only costs the copy. Measured on one core.
_TOGETHER_CPU = 64 * 64
_TOGETHER = 512 * 512


class OrthoReg:
    """λ Σ ‖G(ΔW) − I‖_F over the layers of a model, to be added to the loss of a fine-tune.

        reg = OrthoReg(model, lam=1.0)         # before the first step: W0 is what it finds
        loss = task_loss(model(x), y) + reg.loss()

    G is the smaller Gram matrix of ΔW = W − W0 (see :func:`orthoreg_loss`). Chosen are the
    trainable parameters of exactly two dimensions except embeddings, whose rows are looked up one
    by one. A fused QKV weight is one matrix, as in the authors' code. LoRA layers built like PEFT's
    are found by themselves, at O((out + in) r²) each: their ΔW is s·B·A of every active adapter,
    and A and B are not penalised as matrices of their own.

    While ΔW is small, G − I is nearly −I: the penalty then inflates ΔW towards unit singular
    values, ‖ΔW‖_F = √min(out, in), against weight decay. It also takes its share of a gradient
    that is clipped. So look at the accuracy on the task itself beside that of the merge.

    FSDP2 and other DTensors: every rank must call :meth:`loss`; Gram matrices of shares are summed
    (one all-reduce of min × min a layer), ΔW is gathered where it is cut along its shorter side.
    Under DistributedDataParallel every rank computes the same penalty; the gradients' mean is that
    of one, so do not sum or scale it.

    Args:
        model: Weights are read at each call. DDP and ``torch.compile`` are looked through.
        lam: λ ≥ 0. The authors choose it on validation data from 0.1 to 100, for ``power=1``; under
            ``power=2`` about a hundredth of it. Can be changed at any time (``reg.lam = …``).
        power: 1 (the authors' code) or 2 (the paper's formula).
        target: ``"identity"``; ``"offdiag"`` (ours): only G's off-diagonal entries.
        params: ``"2d"``; patterns such as ``"blocks.*.attn.*"`` for the names of parameters and of
            LoRA adapters (``"path.of.layer.default"``); a function of ``(name, tensor)``, which
            gets B for a LoRA layer. The last two also reach embeddings and convolutions, the latter
            as ``[out, in·kh·kw]``.
        reference: W0 by name. Not copied: it may be in bfloat16, on another device, memory-mapped,
            shared by many experts. If it was rounded, so is ΔW: by 2⁻⁹ of W in bfloat16. None
            copies the chosen parameters as they are.
        every: Compute it at every k-th call, k times as strong; 0 at the calls between.

    Attributes:
        updates: The chosen layers, by name.
        skipped: Other matrices, and why.

    Raises:
        ValueError: λ, power, target or every out of range; nothing matches, or a pattern matches
            no matrix; ``reference`` lacks a name or has another shape.
        TypeError: a chosen parameter is not real floating point; FSDP1, which flattens parameters.
        NotImplementedError: a chosen adapter is DoRA or another variant.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lam: float | int = 1.0,
        power: int = 1,
        target: str = "identity",
        params: str | Sequence[str] | Callable[[str, Tensor], bool] = "2d",
        reference: Mapping[str, Tensor] | None = None,
        every: int = 1,
    ) -> None:
        if not 0 <= lam < float("inf"):
            raise ValueError(f"lam must be finite and at least 0, got {lam}")
        check_options(power, target)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
        self.lam = lam
        self.power = power
        self.target = target
        self.every = every
        self.calls = 0
        self.updates, self.skipped = find_updates(model, params, reference)

    def __repr__(self) -> str:
        layers = len(self.updates)
        return (
            f"OrthoReg({layers} layer{'s' * (layers > 1)}, lam={self.lam}, power={self.power}, "
            f"target={self.target!r}, every={self.every})"
        )

    def loss(self) -> Float[Tensor, ""]:
        """λ Σ over layers, of the weights as they are; call it once per optimizer step.

        Raises:
            ValueError: a ΔW holds NaN or infinities (not looked for in compiled code).
        """
        due = self.lam > 0 and self.calls % self.every == 0
        self.calls += 1
        if not due:
            update = next(iter(self.updates.values()))
            w = update.parameter() if isinstance(update, DenseUpdate) else update.weights()[0]
            # A leaf of its own, so that a backward pass from it alone goes through.
            dtype = compute_dtype(w.dtype)
            return torch.zeros((), dtype=dtype, device=w.device, requires_grad=True)
        losses = self._losses()
        total = (self.lam * self.every) * torch.stack(list(losses.values())).sum()
        self._check(total, losses)
        return total

    @torch.no_grad()
    def per_layer(self) -> dict[str, float]:
        """‖G − I‖_F of every layer (its square under ``power=2``), without λ.

        Raises:
            ValueError: a ΔW holds NaN or infinities.
        """
        losses = self._losses()
        total = torch.stack(list(losses.values())).sum()
        self._check(total, losses)
        return {name: float(value) for name, value in losses.items()}

    def state_dict(self, *, reference: bool = True) -> dict[str, Any]:
        """What a resumed run needs: settings, calls so far and, if wanted, W0 of dense layers.

        W0 is not copied; leave it out where the checkpoint of the base model is at hand.
        """
        state: dict[str, Any] = {
            "lam": self.lam,
            "power": self.power,
            "target": self.target,
            "every": self.every,
            "calls": self.calls,
        }
        if reference:
            state["reference"] = {n: u.reference for n, u in self._dense().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. W0 stays as it is where the state has none.

        Raises:
            KeyError: a setting is missing.
            ValueError: a setting is out of range; W0 of other layers or of another shape.
        """
        settings = {key: state[key] for key in ("lam", "power", "target", "every", "calls")}
        check_options(settings["power"], settings["target"])
        if not 0 <= settings["lam"] < float("inf") or settings["every"] < 1:
            raise ValueError(
                f"state must have lam ≥ 0 and every ≥ 1, got {settings['lam']} and "
                f"{settings['every']}"
            )
        dense = self._dense()
        starts = state.get("reference")
        if starts is not None:
            if set(starts) != set(dense):
                odd = sorted(set(starts) ^ set(dense))
                raise ValueError(
                    f"state's reference must be of the same layers; only one has {odd}"
                )
            for name, update in dense.items():
                if starts[name].shape != update.reference.shape:
                    raise ValueError(
                        f"state's reference of {name} must have shape "
                        f"{tuple(update.reference.shape)}, got {tuple(starts[name].shape)}"
                    )
            for name, update in dense.items():
                update.reference = starts[name].detach()
        for key, value in settings.items():
            setattr(self, key, value)

    def _dense(self) -> dict[str, DenseUpdate]:
        return {n: u for n, u in self.updates.items() if isinstance(u, DenseUpdate)}

    def _losses(self) -> dict[str, Tensor]:
        """The loss of every layer; those of one small shape come from one product."""
        groups: dict[tuple[object, ...], list[Update]] = {}
        for name, update in self.updates.items():
            groups.setdefault(_together(update) or (name,), []).append(update)
        found: dict[str, Tensor] = {}
        for members in groups.values():
            if len(members) == 1:
                with without_autocast(_weight(members[0])):
                    values = [members[0].loss(self.power, self.target)]
            else:
                values = list(self._stacked(members).unbind())
            found.update({u.name: v for u, v in zip(members, values, strict=True)})
        first = found[next(iter(self.updates))]
        return {name: found[name].to(first) for name in self.updates}

    def _stacked(self, members: Sequence[Update]) -> Tensor:
        with without_autocast(_weight(members[0])):
            low = [u for u in members if isinstance(u, LowRankUpdate)]
            if low:
                b, a = (torch.stack(list(x)) for x in zip(*(u.factors() for u in low), strict=True))
                scaling = low[0].scaling
                return lowrank_distance(b, a, scaling, self.power, self.target)
            dense = [u for u in members if isinstance(u, DenseUpdate)]
            return distance(torch.stack([u.delta() for u in dense]), self.power, self.target)

    def _check(self, total: Tensor, losses: Mapping[str, Tensor]) -> None:
        if torch.compiler.is_compiling() or total.is_meta or bool(total.isfinite()):
            return
        bad = [name for name, value in losses.items() if not bool(value.isfinite())]
        raise ValueError(
            f"ΔW of {', '.join(bad) or 'all layers together'} holds NaN or infinities, or its Gram "
            f"matrix leaves the range of {total.dtype}"
        )


def _weight(update: Update) -> Tensor:
    return update.held if isinstance(update, DenseUpdate) else update.weights()[0]


def _together(update: Update) -> tuple[object, ...] | None:
    """What updates must share to be computed in one product; None for one on its own."""
    if isinstance(update, LowRankUpdate):
        b, a = update.weights()
        return ("lora", b.shape, a.shape, b.dtype, a.dtype, b.device, update.scaling)
    w = update.parameter()
    limit = _TOGETHER_CPU if w.device.type == "cpu" else _TOGETHER
    if is_sharded(w) or w.numel() > limit:
        return None
    return ("dense", w.shape, w.dtype, w.device)
