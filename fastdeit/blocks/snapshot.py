"""Detects any change of modules since the checklist ran on them, so that it need not run at every call.

Every attribute, child, parameter, class, hook and forward is compared, not a selection for each module: a rule of the checklist
cannot depend on anything that is not compared.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain, starmap
from operator import eq, is_
from typing import Any

import torch
from torch import nn
from torch._C import _dynamo

# A number that is another one after each change of a dict (PEP 509). From Python 3.12 on PyTorch counts by watching the dict, which
# was not tested here: everything is compared instead.
_version: Any = _dynamo.guards.dict_version if sys.version_info < (3, 12) else None

KEY = "_fastdeit_record"  # in a module's __dict__
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TABLES = ("_parameters", "_buffers", "_modules")

# (class, name of a method) -> the class's own, None if something had replaced it before fastdeit was imported. Fused runs take the
# place of these.
OWN_METHODS: dict[tuple[type, str], Callable | None] = {}
# Those of them that only models of one library have. A snapshot compares these where a module is of the class.
HOST_METHODS: set[tuple[type, str]] = set()


def register_methods(kind: type, *names: str, host: bool = False) -> None:
    """Records methods of a class whose work the kernels do in their place. `host`: only models of its library have such modules."""
    if host:
        HOST_METHODS.update((kind, name) for name in names)
    for name in names:
        method = getattr(kind, name)
        defined_by = next(base for base in kind.__mro__ if name in base.__dict__)
        OWN_METHODS[kind, name] = method if method.__module__ == defined_by.__module__ else None


class Snapshot:
    """Everything about a module and its descendants that a rule could read, as it was.

    What is compared: attributes, by identity or equality; entries of parameters, buffers and children, by identity; classes; hooks;
    the methods of known classes. What a tensor itself may change, such as its dtype, is asked of it at each call. Dicts of an
    unchanged version are not looked into.
    """

    __slots__ = (
        "before",
        "dicts",
        "empty",
        "entries",
        "hooked",
        "kinds",
        "methods",
        "modules",
        "sizes",
        "states",
        "versions",
        "views",
        "watched",
    )

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.modules())
        self.kinds = list(map(type, self.modules))
        self.states = [module.__dict__ for module in self.modules]
        self.before = list(map(dict, self.states))
        tables = [state[name] for state in self.states for name in _TABLES]
        hooks = [state[name] for state in self.states for name in _HOOKS]
        self.empty = [table for table in (*hooks, *tables) if not table]
        self.hooked = [(table, dict(table)) for table in hooks if table]
        self.views = [table.values() for table in tables if table]
        self.sizes = list(map(len, self.views))
        self.entries = list(chain.from_iterable(self.views))
        dicts = [*self.states, *filter(None, (*hooks, *tables))]
        known = _version is not None and {type(each) for each in dicts} <= {dict, OrderedDict}
        self.dicts = dicts if known else []
        self.versions: list[int] | None = None
        classes = {base for kind in set(self.kinds) for base in kind.__mro__}
        self.watched = [key for key in OWN_METHODS if key not in HOST_METHODS or key[0] in classes]
        self.methods = list(starmap(getattr, self.watched))

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        # Before anything is read: another thread may change it.
        versions = list(map(_version, self.dicts)) if self.dicts else None
        try:
            return (
                not any(self.empty)
                and ((versions is not None and versions == self.versions) or self._dicts_unchanged(versions))
                and list(map(type, self.modules)) == self.kinds
                and list(starmap(getattr, self.watched)) == self.methods
            )
        except (
            RuntimeError,
            ValueError,
            TypeError,
        ):  # an attribute that does not compare to a truth value, such as a tensor
            return False

    def _dicts_unchanged(self, versions: list[int] | None) -> bool:
        """Whether they hold what they held. `versions` were asked for before."""
        unchanged = (
            all(map(eq, self.states, self.before))  # the same objects are not looked into
            and list(map(len, self.views)) == self.sizes
            and all(map(is_, chain.from_iterable(self.views), self.entries))
            and all(starmap(eq, self.hooked))
        )
        if unchanged:
            self.versions = versions
        return unchanged


class Record:
    """A module's description and what the checklist says of it, with the snapshot that they were made from.

    Attributes:
        made: what others made of the answer, of no use once it is another.

    It stays behind when a module is copied or pickled: the copy is looked at anew.
    """

    __slots__ = ("answer", "made", "snapshot", "state")

    def __init__(self) -> None:
        self.state = self.snapshot = self.answer = self.made = None

    def __reduce__(self) -> tuple:
        return Record, ()


def looked_at(module: nn.Module) -> tuple[Any, Any]:
    """`module.describe()` and `module.judge()` of it, made again only when something about the module has changed."""
    if torch.compiler.is_compiling():  # Dynamo guards what it sees read
        description = module.describe()
        return description, module.judge(description)
    state = module.__dict__
    record = state.get(KEY)
    if (
        record is None or record.state is not state
    ):  # none yet, or that of the module which this one is a shallow copy of
        record = state[KEY] = Record()
    snapshot, answer = record.snapshot, record.answer
    if snapshot is None or not snapshot.unchanged():
        description = module.describe()
        record.state, record.answer = state, (answer := (description, module.judge(description)))
        record.made, record.snapshot = None, Snapshot(module)
    return answer


def made_from(module: nn.Module, answer: tuple[Any, Any], make: Callable[[], Any]) -> Any:
    """What `make` gave for this answer of `looked_at`, kept until something about the module changes."""
    record = module.__dict__[KEY]
    made = record.made
    if made is None or made[0] is not answer:
        made = record.made = answer, make()
    return made[1]
