"""What the tests use of PyTorch's own test code, without what importing it changes elsewhere.

It loads a hypothesis profile of ten examples and freezes ``torch.backends`` for the whole process.
"""

import hypothesis
import torch

_profile = hypothesis.settings.get_current_profile_name()
_backends = torch.backends.disable_global_flags.__globals__
_mutable = _backends["__allow_nonbracketed_mutation_flag"]

from torch.testing._internal.common_optimizers import (  # noqa: E402
    ErrorOptimizerInput as ErrorOptimizerInput,
)
from torch.testing._internal.common_optimizers import (  # noqa: E402
    OptimizerErrorEnum as OptimizerErrorEnum,
)
from torch.testing._internal.common_optimizers import OptimizerInfo as OptimizerInfo  # noqa: E402
from torch.testing._internal.common_optimizers import OptimizerInput as OptimizerInput  # noqa: E402
from torch.testing._internal.common_optimizers import TensorTracker as TensorTracker  # noqa: E402
from torch.testing._internal.common_optimizers import (  # noqa: E402
    get_error_inputs_for_all_optims as get_error_inputs_for_all_optims,
)
from torch.testing._internal.common_optimizers import optim_db as optim_db  # noqa: E402
from torch.testing._internal.common_utils import TestCase as TestCase  # noqa: E402

hypothesis.settings.load_profile(_profile)
_backends["__allow_nonbracketed_mutation_flag"] = _mutable
