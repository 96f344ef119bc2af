"""Models of other libraries than timm in `fastdeit run`: accelerated where their library makes them, once a script imports it."""

import contextlib
import functools
import importlib.abc
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

# File -> class, and its methods that make a model, or are its constructor.
_MAKERS = {
    "open_clip.transformer": ("VisionTransformer", ("__init__",)),
    "torchvision.models.vision_transformer": ("VisionTransformer", ("__init__",)),
    "transformers.modeling_utils": ("PreTrainedModel", ("from_pretrained", "_from_config")),
    "vit_pytorch.simple_vit": ("SimpleViT", ("__init__",)),
    "vit_pytorch.vit": ("ViT", ("__init__",)),
}


class _Imports(importlib.abc.MetaPathFinder):
    """Hands the files above to a function when they are imported; it finds nothing itself."""

    def __init__(self, imported: Callable[[ModuleType], None]) -> None:
        self.imported = imported

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _MAKERS:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.imported(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def made_models(accelerated: Callable[[nn.Module], None]) -> Iterator[None]:
    """Inside, `accelerated` is called with every model that a constructor or method above makes. No library is imported."""
    replaced: list[tuple[type, str, Any]] = []

    def replace(module: ModuleType) -> None:
        owner_name, methods = _MAKERS[module.__name__]
        owner = getattr(module, owner_name, None)
        if owner is None:  # another version
            return
        for name in methods:
            own = vars(owner).get(name)
            if own is not None:
                replaced.append((owner, name, own))
                setattr(owner, name, _making(own, accelerated))

    finder = _Imports(replace)
    sys.meta_path.insert(0, finder)
    for name in _MAKERS:
        if name in sys.modules:
            replace(sys.modules[name])
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for owner, name, own in reversed(replaced):
            setattr(owner, name, own)


def _making(own: Any, accelerated: Callable[[nn.Module], None]) -> Any:
    """A constructor, or a class method that returns a model or a tuple with one in front, and then the call of `accelerated`."""
    function = own.__func__ if isinstance(own, classmethod) else own

    @functools.wraps(function)
    def make(first: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(first, *args, **kwargs)
        made = first if result is None else result[0] if isinstance(result, tuple) else result
        if isinstance(made, nn.Module):
            accelerated(made)
        return result

    return classmethod(make) if isinstance(own, classmethod) else make
