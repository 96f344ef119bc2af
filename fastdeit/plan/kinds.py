"""The kinds of call that a module has had, what stands for each, and which have a plan where there are more kinds than plans."""

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

MOST_PLANS = 64  # of a module: of 12 blocks one takes 1 MB of the host's memory, with gradients 2.4 MB
_MOST_OTHERS = 256  # kinds without a plan
_CALLS = 8  # of a kind since the last one of another kind before it gets that one's plan

SEEN = "called once"


class Kind:
    """A kind of call.

    Attributes:
        entry: by what it runs. `SEEN`: op by op, to be recorded; any other text: op by op, for that reason.
        attempts: recordings that came to nothing.
        calls: when the last ones were, by the clock of its `Kinds`.
    """

    __slots__ = ("attempts", "calls", "entry")

    def __init__(self) -> None:
        self.entry: Any = None
        self.attempts = 0
        self.calls: deque[int] = deque(maxlen=_CALLS)

    def planned(self) -> bool:
        """Whether there is a plan, or will be after a backward pass."""
        return self.entry is not None and not isinstance(self.entry, str)

    def last_called(self) -> int:
        return self.calls[-1]


class Kinds:
    """Those of one module, by key. Threads may call the module together."""

    def __init__(self) -> None:
        self._by_key: dict[tuple, Kind] = {}
        self._clock = itertools.count()
        self._changing = threading.Lock()

    def called(self, key: tuple) -> Kind:
        """The kind of a call that is made now."""
        kind = self._by_key.get(key)
        if kind is None:
            kind = self._add(key)
        kind.calls.append(next(self._clock))
        return kind

    def _add(self, key: tuple) -> Kind:
        with self._changing:
            others = {known: kind for known, kind in self._by_key.items() if not kind.planned() and kind.calls}
            if len(others) >= _MOST_OTHERS:
                del self._by_key[min(others, key=lambda known: others[known].last_called())]
            return self._by_key.setdefault(key, Kind())

    def make_room(self, kind: Kind) -> bool:
        """Whether another kind may have a plan, this one. The one that was not called for longest then loses its own, if need be.

        Plans that are made anew all the time, since a program has more kinds of call than that, would cost more than they save.
        """
        with self._changing:
            if not self.full():
                return True
            oldest = min((each for each in self._by_key.values() if each.planned()), key=Kind.last_called)
            if len(kind.calls) < _CALLS or kind.calls[0] < oldest.last_called():
                return False
            oldest.entry = SEEN
            return True

    def full(self) -> bool:
        """Whether as many kinds have plans as may."""
        return sum(kind.planned() for _, kind in self) >= MOST_PLANS

    def clear(self) -> None:
        with self._changing:
            self._by_key.clear()

    def __iter__(self) -> Iterator[tuple[tuple, Kind]]:
        return iter(list(self._by_key.items()))
