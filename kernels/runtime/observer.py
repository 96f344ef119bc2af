"""Observers of launches. An op runs the same kernels with and without an observer."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LaunchObserver(TorchDispatchMode):
    """A dispatch mode that also receives kernel launches. Ops call their launchers directly under it, as without a mode.

    It is the innermost mode where it is in force, also in the threads of a backward pass that it surrounds.
    """

    def launched(self, launch: Any) -> None:
        """A launch was made by the direct call: a `launch.DirectLaunch`."""
        raise NotImplementedError

    def launched_publicly(self) -> None:
        """A kernel was launched, or only compiled, in another way."""
        raise NotImplementedError


def launch_observer() -> LaunchObserver | None:
    """The one in force in this thread."""
    depth = torch._C._len_torch_dispatch_stack()
    if depth == 0:
        return None
    innermost = torch._C._get_dispatch_stack_at(depth - 1)
    return innermost if isinstance(innermost, LaunchObserver) else None


def under_dispatch_mode() -> bool:
    """Whether a dispatch mode that is to see PyTorch's operations surrounds the call."""
    depth = torch._C._len_torch_dispatch_stack()
    if depth == 0:
        return False
    return any(not isinstance(torch._C._get_dispatch_stack_at(i), LaunchObserver) for i in range(depth))
