"""Commit groups of asynchronous operations: cp.async and bulk copies by thread, wgmma by warpgroup (PTX ISA 9.7.9.25, 9.7.15)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import ndarray


class _Issued(NamedTuple):
    agents: ndarray  # who issued it
    groups: ndarray  # the number of each agent's commit group
    complete: Callable[[ndarray], None]  # given positions in `agents`


class CommitGroups:
    """Args:
    agents: number of threads or warpgroups.

    Attributes:
        committed, completed: groups of each agent so far.
    """

    def __init__(self, agents: int) -> None:
        self.committed = np.zeros(agents, np.int64)
        self.completed = np.zeros(agents, np.int64)
        self._issued: list[_Issued] = []

    def issue(self, agents: ndarray, complete: Callable[[ndarray], None]) -> None:
        """An operation of the group that each agent commits next; `complete` is called when waited for."""
        self._issued.append(_Issued(agents, self.committed[agents], complete))

    def commit(self, agents: ndarray) -> None:
        self.committed[agents] += 1

    def wait(self, agents: ndarray, allowed: int) -> None:
        """Completes all but the last `allowed` groups of each agent."""
        self.completed[agents] = np.maximum(self.completed[agents], self.committed[agents] - allowed)
        left = []
        for issued in self._issued:
            done = issued.groups < self.completed[issued.agents]
            if done.any():
                issued.complete(np.flatnonzero(done))
            if not done.all():
                keep = ~done
                left.append(_rest(issued, np.flatnonzero(keep)) if done.any() else issued)
        self._issued = left

    def unfinished(self) -> bool:
        return bool(self._issued)


def _rest(issued: _Issued, positions: ndarray) -> _Issued:
    return _Issued(issued.agents[positions], issued.groups[positions], lambda part: issued.complete(positions[part]))
