"""What a call launched, in forms that can be compared: the addresses differ from call to call, and what they are of must not."""

import functools
import gc

import torch

from fastdeit.kernels.runtime.observer import LaunchObserver
from fastdeit.testing import fake_cuda

KINDS = ("launch", "triton_launch", "gemm", "memset", "copy_on_device")
_LOWEST_ADDRESS = 2**33  # of the fake device; integers and numbers among the arguments are smaller


class WithoutPlans(LaunchObserver):
    """No plan is made or used under it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})

    def launched(self, launch):
        pass

    def launched_publicly(self):
        pass


def recorded(call):
    """The events of call(), in which each tensor has an address of its own. It captures no graph, which allocates from a pool."""
    with fake_cuda.separate_memory():
        return launched(call)


def launched(call):
    """The events of call()."""
    with fake_cuda.record(*KINDS) as events:
        call()
    return events


def _with_arguments(events, address):
    for event in events:
        arguments = []
        for argument in event.arguments:
            number = int.from_bytes(argument, "little")
            if len(argument) == 128:
                found = fake_cuda.tensor_map(argument)
                arguments.append((address(found.address), *found[1:]))
            else:
                arguments.append(address(number) if len(argument) == 8 and number > _LOWEST_ADDRESS else number)
        yield event._replace(arguments=tuple(arguments))


def dataflow(events):
    """Events with addresses as numbers in the order in which they come up: equal lists have the same tensors in the same places."""
    names = {}
    return list(_with_arguments(events, lambda address: ("tensor", names.setdefault(address, len(names)))))


def of_parameters(events, model):
    """Events with addresses as names of the model's parameters, and nothing for other memory."""

    places = [
        (name, parameter.data_ptr(), parameter.untyped_storage().nbytes())
        for name, parameter in model.state_dict(keep_vars=True).items()
    ]

    @functools.cache
    def name(address):
        for name, start, size in places:
            if 0 <= address - start < size:
                return name, address - start
        return "elsewhere"

    return list(_with_arguments(events, name))


FOLDS, MERGED_FOLDS = "fold_both_forward_kernel", "fold_four_forward_kernel"
_SCRATCH = 2  # pointers that Triton passes behind a kernel's own arguments


def unmerged(planned, ops):
    """A plan's events, in which a launch that stands for two is these two, the second one where the ops fold next.

    Of `ops` this reads where they fold, the first one's grid and the shared memory, of which nothing is in the launch for both.
    """
    made, second = [], None
    for event in planned:
        at = ops[len(made)] if len(made) < len(ops) else None
        if second is not None and at is not None and at.name == FOLDS:
            made.append(second._replace(bytes=at.bytes))
            second, at = None, ops[len(made)] if len(made) < len(ops) else None
        if event.name == MERGED_FOLDS and at is not None:
            assert second is None
            own, scratch = event.arguments[:-_SCRATCH], event.arguments[-_SCRATCH:]
            blocks, half = at.grid[0], len(own) // 2
            grids = ((blocks, 1, 1), (event.grid[0] - blocks, 1, 1))
            event, second = (
                event._replace(name=FOLDS, grid=grid, arguments=(*each, *scratch), bytes=at.bytes)
                for grid, each in zip(grids, (own[:half], own[half:]), strict=True)
            )
        made.append(event)
    return made if second is None else [*made, second]


def addresses(event):
    """All that an event is given."""
    found = []
    list(_with_arguments([event], found.append))
    return found


def precision(dtype):
    """Autocast to a dtype, none for None. Without its cache all calls cast weights, not the first alone."""
    return torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)


def requested_bytes(when="current"):
    """Memory asked for. The allocator's own count has up to 1 MiB a tensor more, by what earlier tests left in its cache."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def reset_peak():
    """Begins a measurement of the most memory, without garbage of earlier tests that would be freed during it."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
