"""What the processes of :mod:`ranks` have in common, imported once."""

import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

import stiefel.optim
import stiefel.optim.distributed.engine  # noqa: F401
