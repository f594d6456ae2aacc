"""Run by test_dictionary in a process of its own: checked annotations cannot be compiled."""

import torch

from stiefel.numerics import DictionaryState, fw_step, start_dictionary

start = start_dictionary(3, "dct")
state = DictionaryState(start.A, start.G, torch.tensor(0))
fast = torch.compile(fw_step, backend="aot_eager", fullgraph=True)
expected = state
generator = torch.Generator().manual_seed(0)
for _ in range(3):
    y = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    state, expected = fast(state, y), fw_step(expected, y)
torch.testing.assert_close(state.A, expected.A)
assert int(state.t) == 3
print("one graph")
