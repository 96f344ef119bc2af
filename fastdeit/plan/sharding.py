"""Parameters that FSDP2's `fully_shard` gathers: at each call, and again before backward, into other memory."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of the tensors that are gathered parameters, of any module of this process."""
    groups = (group for state in _states() if (group := getattr(state, "_fsdp_param_group", None)) is not None)
    found = {id(getattr(each, "_unsharded_param", None)) for group in groups for each in group.fsdp_params}
    return [tensor for tensor in tensors if id(tensor) in found]


def managed_otherwise() -> bool:
    """Whether a composable API of PyTorch's other than FSDP2, or FSDP2 of another version, manages a module of this process."""
    return not all(hasattr(state, "_fsdp_param_group") for state in _states())


def _states() -> Iterable[Any]:
    """What PyTorch's composable APIs keep of the modules that they manage."""
    states = sys.modules.get("torch.distributed._composable_state")
    found = () if states is None else list(states._module_state_mapping.values())
    return [state for reference in found if (state := reference()) is not None]
