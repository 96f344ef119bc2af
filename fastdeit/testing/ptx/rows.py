"""Runs the cases of an architecture and reports on every shipped row that they launch."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from fastdeit.aot import catalog
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.testing.ptx.cases import Case, Errors, cases
from fastdeit.testing.ptx.compiler import Variant
from fastdeit.testing.ptx.counts import Counts
from fastdeit.testing.ptx.harness import Launched, executing
from fastdeit.testing.ptx.machine import IN_STEP, Schedule

SHUFFLED = Schedule(seed=1, shuffled=True)
PERTURBED = Schedule(seed=1, perturbed=True)


@dataclasses.dataclass
class Ran:
    """One case: what it launched, its errors, and what went wrong.

    rows: (kernel, label) of each shipped row that it launched -> its counts. instructions: of all launches, in warps. failure:
    None, or the error's text. seconds: of processor time. opcodes: that were executed.
    """

    case: str
    rows: dict[tuple[str, str], Counts] = dataclasses.field(default_factory=dict)
    instructions: int = 0
    errors: Errors = dataclasses.field(default_factory=dict)
    failure: str | None = None
    opcodes: set[str] = dataclasses.field(default_factory=set)
    seconds: float = 0.0

    @property
    def worst(self) -> tuple[float, float, float]:
        """Largest RMS error beside its limit among outputs and gradients: the kernels', PyTorch's, and that as a share."""
        rms = [error[1] for error in self.errors.values() if error[1].limit > 0]
        found = max(rms, key=lambda e: e.fused / e.limit, default=None)
        return (found.fused, found.eager, found.fused / found.limit) if found else (0.0, 0.0, 0.0)


def run_case(case: Case, arch: int, *, thorough: bool) -> Ran:
    """Executes a case in step and, if thorough, under another schedule (equal bits) and with perturbed approximations."""
    ran = Ran(case.name)
    started = time.process_time()

    def note(launched: Launched) -> None:
        ran.instructions += int(launched.machine.executed.sum())
        row = rows_of(arch).get(launched.variant)
        if row is not None:
            name = row.kernel.__name__, row.label
            ran.rows[name] = ran.rows.get(name, Counts()) + launched.counts
        instructions = launched.machine.program.instructions
        ran.opcodes |= {i.opcode for i, n in zip(instructions, launched.machine.executed, strict=True) if n}

    runs: Sequence[Sequence[Schedule]] = ((IN_STEP, SHUFFLED), (PERTURBED,)) if thorough else ((IN_STEP,),)
    try:
        for schedules in runs:
            torch.manual_seed(0)
            with executing(arch, schedules, on_launch=note if schedules is runs[0] else None):
                errors = case.run()
            ran.errors = ran.errors or errors
    except Exception as error:
        ran.failure = f"{type(error).__name__}: {error}"
    ran.seconds = time.process_time() - started
    return ran


def run_named(job: tuple[int, str, bool]) -> Ran:
    """`run_case` for an architecture, a case's name and whether to be thorough: what a worker process is handed."""
    arch, name, thorough = job
    torch.set_num_threads(1)
    return run_case(next(case for case in cases(arch) if case.name == name), arch, thorough=thorough)


@functools.cache
def rows_of(arch: int) -> dict[Variant, AotConfig]:
    """Every shipped row by what a launch of it compiles."""
    return {variant_of_row(row): row for row in catalog.aot_configs(arch)}


def variant_of_row(row: AotConfig) -> Variant:
    types = tuple(catalog.argument_types(row).items())
    return Variant(row.kernel, types, frozenset(), row.num_warps, row.num_stages, row.fp_fusion)


def not_launched(rans: Iterable[Ran], arch: int) -> list[str]:
    """Shipped rows that no case launched."""
    launched = set().union(*(ran.rows for ran in rans))
    names = [(row.kernel.__name__, row.label) for row in rows_of(arch).values()]
    return [f"{kernel} ({label})" for kernel, label in names if (kernel, label) not in launched]


def uses_tcgen05(failure: str | None) -> bool:
    """Whether a case failed only because the machine does not know sm_100's tensor memory."""
    return failure is not None and "unknown instruction tcgen05" in failure


def report(rans: Sequence[Ran], arch: int, print_line: Callable[[str], None] = print) -> None:
    """A line a case: warp instructions, RMS error beside PyTorch's, seconds."""
    for ran in rans:
        fused, eager, share = ran.worst
        state = ran.failure or f"RMS {fused:.2e}, eager {eager:.2e}, {share:.2f} of the limit"
        print_line(f"sm_{arch} {ran.case}: {ran.instructions} warp instructions, {state}, {ran.seconds:.1f} s")


def count_row(row: AotConfig, arch: int) -> Counts:
    """What one launch or more of a shipped row executes and moves, in the case that launches it.

    Raises:
        LookupError: no case launches it.
    """
    name = row.kernel.__name__, row.label
    for case in cases(arch):
        found = run_case(case, arch, thorough=False).rows.get(name)
        if found is not None:
            return found
    raise LookupError(f"no case launches {name[0]} ({name[1]}) on sm_{arch}")
