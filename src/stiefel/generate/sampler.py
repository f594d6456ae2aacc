"""The steps of sampling: what does not change from step to step is computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stiefel.generate.attention import Condition, ConditionedNetwork
from stiefel.generate.context import Contexts
from stiefel.generate.schedules import Grid, ddim_scheduler

# Matrix libraries compute the last rows of a batch that is no multiple of this by another kernel,
# whose last bits differ. Filled up, every row comes out as it does in any other batch.
KERNEL_ROWS = 8


def _filled(rows: Tensor) -> Tensor:
    """The last row repeated until their number is a multiple of :data:`KERNEL_ROWS`."""
    missing = -len(rows) % KERNEL_ROWS
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


class Sampler:
    """DDIM over one grid: keys and values once an entry, modulations once for all steps."""

    def __init__(
        self,
        network: ConditionedNetwork,
        grid: Grid,
        prediction: str,
        chosen: Contexts,
        scale: float,
        null: str,
    ) -> None:
        self.network, self.grid, self.scale = network, grid, scale
        self.scheduler: Any = ddim_scheduler(grid, prediction)
        with torch.no_grad():
            self.modulations = network.modulations(_filled(grid.times.to(network.null.device)))
            vector = network.null if null == "learned" else torch.zeros_like(network.null)
            self.null = network.null_outputs(vector) if scale != 1 else ()
            vectors = _filled(chosen.vectors.to(network.null))
            self.pairs = [a.pair(vectors) for a in network.attentions] if scale else []
        self.places = chosen.places.to(vectors.device)

    def condition(self, rows: slice) -> Condition:
        """Of some of the samples."""
        if not self.scale:
            return Condition((), 0, None, self.null)
        places = self.places[rows]
        pairs = tuple((keys[places], values[places]) for keys, values in self.pairs)
        return Condition(pairs, len(places), None, self.null)

    @torch.no_grad()
    def __call__(self, x: Tensor, rows: slice) -> Tensor:
        """From the noise ``x`` of the samples ``rows`` to their images."""
        condition = self.condition(rows)
        guided = self.scale > 1
        for step in self.scheduler.timesteps.tolist():
            modulations = tuple(m[step : step + 1] for m in self.modulations)
            # Both branches in one batch; the rows with neighbours come first.
            out = self.network.run(torch.cat([x, x]) if guided else x, modulations, condition)
            if guided:
                with_, without = out.chunk(2)
                out = without + self.scale * (with_ - without)
            x = self.scheduler.step(
                out, step, x, use_clipped_model_output=self.grid.clip, return_dict=False
            )[0]
        return x
