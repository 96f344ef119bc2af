"""An estimate of a kernel's time from its instructions, and what bounds it. The model is described in docs/instruction-stream.md.

Nothing here was fitted to this project's kernels: none has run on the GPUs in question. The one fitted constant, OVERLAP, comes
from a published figure of another attention kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fastdeit.aot.devices import Device
from fastdeit.aot.execution import Execution
from fastdeit.aot.instruction_stream import InstructionStream
from fastdeit.cost.formulas import Cost

# Of the work of all units but the busiest, what runs while that one is busy.
OVERLAP = 0.5
CLOCKS_PER_INSTRUCTION = 1.5  # of a warp by itself, in code with some independent instructions
CLOCKS_PER_BARRIER = 25  # a barrier among a block's warps, or a shuffle, until what depends on it can be issued
_WARP = 32
_SCHEDULERS = 4  # of a multiprocessor; each issues one instruction a clock


@dataclass(frozen=True)
class Workload:
    """A launch of a kernel.

    Args:
        programs: of the grid.
        trips: iterations of the kernel's loop in one program.
        cost: the operations and bytes that the floor counts.
        l2_bytes: what crosses the L2 cache where that is more than the floor's bytes.
        matrix_flops: of all programs' matrix products, padding included, where the machine code does not tell.
    """

    programs: int
    trips: float
    cost: Cost
    l2_bytes: int = 0
    matrix_flops: int = 0


@dataclass(frozen=True)
class Estimate:
    """microseconds: of the launch; floor: of the least traffic and arithmetic; bound: what decides it."""

    microseconds: float
    floor: float
    bound: str

    @property
    def share(self) -> float:
        """The share of the floor, between 0 and 1."""
        return self.floor / self.microseconds


def estimate(
    stream: InstructionStream,
    matrix_instructions: Mapping[str, int],
    num_warps: int,
    blocks_per_sm: int,
    work: Workload,
    device: Device,
    execution: Execution | None = None,
) -> Estimate:
    """The estimate of one launch on one device.

    Args:
        stream, matrix_instructions, blocks_per_sm: of the compiled kernel.
        num_warps: of a block.
        work: the launch.
        device: the GPU.
        execution: what executing the kernel counted: sectors and wavefronts beyond the ideal take their time. Without it shared
            memory is taken to have no conflicts, and narrow stores are found in the machine code.
    """
    clocks = _clocks(stream, matrix_instructions, num_warps, work, device, execution)
    issue = clocks.pop("issue")
    unit = max(clocks, key=clocks.get)
    busy = clocks[unit]
    if matrix_instructions:
        busy += (1 - (0 if stream.serialised else OVERLAP)) * (sum(clocks.values()) - clocks[unit])
    if issue > busy:
        unit, busy = "issue", issue
    blocks = work.programs / device.multiprocessors  # of one multiprocessor

    l2_bytes = float(max(work.l2_bytes, work.cost.bytes))
    if execution is not None:
        l2_bytes *= execution.accesses.l2_ratio
    else:
        threads = _WARP * num_warps * work.programs
        l2_bytes += threads * (stream.once.scattered_bytes + work.trips * stream.loop.scattered_bytes)
    alone, first = (_one_block_ns(stream, num_warps, trips, device) for trips in (work.trips, min(work.trips, 1)))
    times = {
        "memory": work.cost.bytes / device.memory_tb_per_s / 1e3,
        "L2": l2_bytes / device.l2_tb_per_s / 1e3,
        unit: blocks * busy / device.gigahertz,
        "latency": max(blocks / blocks_per_sm, 1) * alone,
    }
    bound = max(times, key=times.get)
    flops_per_ns = device.matrix_flops * device.matrix_share * device.multiprocessors * device.gigahertz
    floor = max(times["memory"], work.cost.flops / flops_per_ns if matrix_instructions else 0.0)
    return Estimate((times[bound] + first) / 1e3, floor / 1e3, bound)


def _clocks(stream, matrix_instructions, num_warps, work, device, execution) -> dict[str, float]:
    """Clocks that one block keeps each unit of a multiprocessor busy."""
    once, loop = (1.0, 1.0) if execution is None else (x.wavefront_ratio for x in (execution.once, execution.loop))

    def executed(*kinds: str) -> float:
        return sum(stream.once.instructions.get(k, 0) + work.trips * stream.loop.instructions.get(k, 0) for k in kinds)

    def on(lanes: float, *kinds: str) -> float:
        return executed(*kinds) * num_warps * _WARP / lanes

    flops = stream.once.matrix_flops + work.trips * stream.loop.matrix_flops or work.matrix_flops / work.programs
    by_warp = all(name == "HMMA" for name in matrix_instructions)
    share = device.mma_sync_share if by_warp else 1.0
    shared = once * stream.once.shared_bytes + loop * work.trips * stream.loop.shared_bytes
    every = {*stream.once.instructions, *stream.loop.instructions}
    return {
        "issue": executed(*every) * num_warps / _SCHEDULERS,
        "matrix": flops / (device.matrix_flops * share) if matrix_instructions else 0.0,
        "special function": on(device.special_lanes, "special"),
        "fp32": on(device.fp32_lanes, "fp32")
        + on(device.fp32_lanes / 2, "fp32 pair")
        + on(device.integer_lanes, "multiply"),
        "integer": on(device.integer_lanes, "integer", "compare", "convert"),
        "uniform": on(device.uniform_lanes, "uniform"),
        "shared memory": shared * num_warps * _WARP / device.shared_bytes + on(device.shuffle_lanes, "shuffle"),
    }


def _one_block_ns(stream: InstructionStream, num_warps: int, trips: float, device: Device) -> float:
    """Time of a block that runs alone on a multiprocessor: the sum of its waits."""
    repeated = 0 if stream.asynchronous else trips
    waits = stream.once.round_trips + stream.asynchronous + repeated * stream.loop.round_trips
    clocks = 0.0
    for section, times in ((stream.once, 1), (stream.loop, trips)):
        dependent = section.instructions.get("barrier", 0) * (num_warps > 1) + section.instructions.get("shuffle", 0)
        clocks += times * (sum(section.instructions.values()) * CLOCKS_PER_INSTRUCTION + dependent * CLOCKS_PER_BARRIER)
    return waits * device.latency_ns + clocks / device.gigahertz
