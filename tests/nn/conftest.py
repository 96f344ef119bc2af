import math
import timeit
from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture
def in_module_calls() -> Callable[[Callable[[], object]], float]:
    """What something costs the host, in calls of an nn.Identity, which take about as long as the module calls that fusing saves.

    Both are Python that looks into dictionaries and both are timed in turns, so that the machine and what else it does cancel.
    """
    modules, x = [nn.Identity() for _ in range(10)], torch.zeros(2, 5, 64)

    def yardstick():
        for module in modules:
            module(x)

    def cost(call: Callable[[], object]) -> float:
        calls = (call, yardstick)
        least = [math.inf, math.inf]
        for _ in range(60):
            for i, each in enumerate(calls):
                least[i] = min(least[i], timeit.timeit(each, number=10))
        return least[0] / (least[1] / len(modules))

    return cost
