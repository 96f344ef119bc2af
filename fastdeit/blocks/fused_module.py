"""What every drop-in class has in common: the class that it stands in for, and a description of each instance."""

from typing import Any, ClassVar

from torch import nn

# Source class -> the fused class that `fastdeit.accelerate` gives its instances.
FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class FusedModule:
    """Mixed into every drop-in, before the host's class.

    A drop-in describes itself as data (`describe`, of `blocks.spec`) and is judged by `blocks.checklist` (`judge`).

    Attributes:
        source: the class that it stands in for.
        memory: what a block saves for backward (`fastdeit.nn.Block`); None where there is no choice.
        drop_path_mode: how a block drops samples (`fastdeit.nn.Block`); None where there is no choice.
        covers_parts: whether what it computes includes its other parts, so that a report has no line for them.
    """

    source: ClassVar[type[nn.Module]]
    memory: str | None = None
    drop_path_mode: str | None = None
    covers_parts: ClassVar[bool] = False

    def __init_subclass__(cls, source: type[nn.Module] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if source is not None:
            cls.source = source
            FUSED_CLASSES[source] = cls

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script cannot compile the accelerated {type(self).__name__}: call fastdeit.restore(model) first"
        )


def is_fused(module: nn.Module) -> bool:
    """Whether it is exactly of a class that `fastdeit.accelerate` gives."""
    kind = type(module)
    return FUSED_CLASSES.get(getattr(kind, "source", None)) is kind


def has_own_forward(module: nn.Module) -> bool:
    """Whether a call runs another forward than the class's. That of the class, bound to its module, is no other: transformers 4
    leaves it on modules whose outputs it collected."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    return getattr(forward, "__self__", None) is not module or forward.__func__ is not type(module).forward
