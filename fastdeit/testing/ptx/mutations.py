"""Plants faults in compiled kernels, one instruction at a time, and counts how many the machine catches.

A mutant deletes or changes one instruction. It is caught by a check where executing it is a `Fault`, and by its values where it
gives other bits than the kernel it was made of, in step or shuffled. What survives both is printed with its line.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdeit.testing.ptx.cases import Case
from fastdeit.testing.ptx.compiler import Compiled, Variant, compile_to_ptx
from fastdeit.testing.ptx.harness import execute, executing, storage_of, variant_of
from fastdeit.testing.ptx.machine import IN_STEP, Fault, Schedule
from fastdeit.testing.ptx.program import Program, PtxError

SHUFFLED = Schedule(seed=11, shuffled=True)


class Mutant(NamedTuple):
    kind: str
    line: int  # of the PTX text, from 1
    before: str
    text: str  # the whole mutated PTX


def _drop(match: re.Match) -> str:
    return ""


def _add(group: int, by: int) -> Callable[[re.Match], str]:
    """Adds to a number in a line."""

    def change(match: re.Match) -> str:
        start, end = match.start(group) - match.start(), match.end(group) - match.start()
        whole = match[0]
        return f"{whole[:start]}{int(match[group] or '0', 0) + by}{whole[end:]}"

    return change


# Name of a kind -> pattern of a line, and what the line becomes.
KINDS: dict[str, tuple[str, Callable[[re.Match], str]]] = {
    "bar.sync dropped": (r"^\tbar\.sync .*", _drop),
    "bar.warp.sync dropped": (r"^\tbar\.warp\.sync .*", _drop),
    "cp.async.wait_group dropped": (r"^\tcp\.async\.wait_group .*", _drop),
    "cp.async.wait_group weakened": (r"^\tcp\.async\.wait_group\s+(\d+).*", _add(1, 1)),
    "cp.async.commit_group dropped": (r"^\tcp\.async\.commit_group.*", _drop),
    "cp.async dropped": (r"^\t(@!?%p\d+ )?cp\.async\.c[ag]\..*", _drop),
    "fence.proxy.async dropped": (r"^\tfence\.proxy\.async.*", _drop),
    "mbarrier.try_wait dropped": (r"^\tmbarrier\.try_wait.*\n.*bra\.uni waitLoop.*", _drop),
    "mbarrier.init dropped": (r"^\t@%p\d+ mbarrier\.init.*", _drop),
    "mbarrier.inval dropped": (r"^\t@%p\d+ mbarrier\.inval.*", _drop),
    "expect_tx dropped": (r"^\t@%p\d+ mbarrier\.arrive\.expect_tx.*", _drop),
    "expect_tx of other bytes": (r"^\t@%p\d+ mbarrier\.arrive\.expect_tx.*?, (\d+);", _add(1, 16)),
    "tensor copy dropped": (r"^\t@%p\d+ cp\.async\.bulk\.tensor.*", _drop),
    "bulk commit dropped": (r"^\tcp\.async\.bulk\.commit_group.*", _drop),
    "bulk wait dropped": (r"^\tcp\.async\.bulk\.wait_group.*", _drop),
    "wgmma.fence dropped": (r"^\twgmma\.fence.*", _drop),
    "wgmma.commit_group dropped": (r"^\twgmma\.commit_group.*", _drop),
    "wgmma.wait_group dropped": (r"^\twgmma\.wait_group.*", _drop),
    "wgmma dropped": (r"^\twgmma\.mma_async.*", _drop),
    "global address moved": (r"^\t(?:@!?%p\d+ )?(?:ld|st)\.global.*\[ %rd\d+ \+ (\d+) \].*", _add(1, 4)),
    "shared address moved": (r"^\t(?:ld|st)\.shared\.b32.*\[%r\d+\+(\d+)\].*", _add(1, 4)),
    "mask widened": (r"^\tsetp\.lt\.s32 .*", lambda m: m[0].replace("setp.lt", "setp.le")),
    "mask dropped": (r"^\tsetp\.lt\.s32\s+(%p\d+), (%r\d+), .*", lambda m: f"\tsetp.eq.s32 {m[1]}, {m[2]}, {m[2]};"),
    "initialisation dropped": (r"^\tmov\.u32 %r\d+, %r\d+;(?=\n\t(?:mov\.u32|@))", _drop),
    "shuffle of another lane": (r"^\tshfl\.sync\.bfly.*, (1|2|4|8), 31, -1;", _add(1, 3)),
    "swizzle changed": (r"^\txor\.b32 .*, (16|32|64|128);", _add(1, 16)),
}


def mutants(ptx: str, most: int, random: np.random.Generator) -> Iterator[Mutant]:
    """At most so many of every kind, chosen at random."""
    for kind, (pattern, change) in KINDS.items():
        found = list(re.finditer(pattern, ptx, re.M))
        for index in sorted(random.permutation(len(found))[:most]):
            match = found[index]
            line = ptx.count("\n", 0, match.start()) + 1
            mutated = ptx[: match.start()] + change(match) + ptx[match.end() :]
            yield Mutant(kind, line, match[0].strip().splitlines()[0], mutated)


# Why a mutant of a kind can be equivalent to the kernel, or what the machine does not check.
REASONS = {
    "bar.sync dropped": "redundant: no conflicting accesses of two threads are ordered by this barrier alone",
    "bar.warp.sync dropped": "redundant: no conflicting accesses of two lanes are ordered by it alone",
    "cp.async.wait_group dropped": "redundant: a later wait comes before the first use",
    "cp.async.wait_group weakened": "redundant: a later wait comes before the first use",
    "cp.async.commit_group dropped": "redundant: the group is empty, or the next commit closes both",
    "fence.proxy.async dropped": "hole: the order of mbarrier.init against tensor copies is not checked",
    "mbarrier.inval dropped": "redundant: the barrier is not initialised again",
    "bulk commit dropped": "redundant: the next commit closes both",
    "bulk wait dropped": "redundant: a later wait comes before the memory is written again",
    "wgmma.fence dropped": "redundant: its registers were not accessed since the fence before",
    "wgmma.commit_group dropped": "redundant: the next commit closes both, before the wait",
    "wgmma.wait_group dropped": "redundant: a later wait comes before the results are used",
    "mask dropped": "redundant here: what it masks is not used",
    "mask widened": "redundant here: at this length the bound is never met, or what it masks is not used",
    "initialisation dropped": "redundant: the masked elements reach no result, whatever they hold",
    "swizzle changed": "redundant here: the changed address is another thread's of the same, complete pattern",
}


class Launch(NamedTuple):
    variant: Variant
    grid: tuple[int, ...]
    args: tuple
    before: list[torch.Tensor]  # the storages' bytes


def launches_of(case: Case, arch: int) -> list[Launch]:
    """The launches of a case with what memory held, a kernel once."""
    found: dict[Variant, Launch] = {}

    def keep(kernel: Any, grid: tuple, args: tuple, constexprs: tuple, num_warps: int, num_stages: int) -> None:
        variant = variant_of(kernel, args, constexprs, num_warps, num_stages)
        found.setdefault(variant, Launch(variant, grid, args, [s.clone() for s in _storages(args)]))

    torch.manual_seed(0)
    with executing(arch, multiprocessors=1, before_launch=keep):
        case.run()
    return list(found.values())


def judge(launch: Launch, mutant: str, arch: int, expected: list[torch.Tensor]) -> str | None:
    """How a mutant is caught: the fault's kind, "other bits", or None. It is first executed in step, then shuffled."""
    _, shared_bytes, maps = compile_to_ptx(launch.variant, arch)
    for schedule in (IN_STEP, SHUFFLED):
        try:
            found = results(launch, Compiled(Program(mutant), shared_bytes, tuple(maps)), schedule)
        except Fault as fault:
            return fault.kind
        except PtxError:
            return "not executable"
        if not all(map(torch.equal, found, expected)):
            return "other bits"
    return None


def results(launch: Launch, compiled: Compiled, schedule: Schedule) -> list[torch.Tensor]:
    """The storages after a launch, which are then as before it."""
    storages = _storages(launch.args)
    for storage, held in zip(storages, launch.before, strict=True):
        storage.copy_(held)
    execute(compiled, launch.grid, launch.args, schedule)
    found = [s.clone() for s in storages]
    for storage, held in zip(storages, launch.before, strict=True):
        storage.copy_(held)
    return found


def _storages(args: tuple) -> list[torch.Tensor]:
    return [storage_of(a) for a in args if isinstance(a, torch.Tensor | TensorDescriptor)]


def run(case: Case, arch: int, most: int, seed: int, print_line: Callable[[str], None] = print) -> Counter:
    """Makes and judges mutants of every kernel of a case; returns how often each (kind, caught by) happened."""
    random = np.random.default_rng(seed)
    outcomes: Counter = Counter()
    for launch in launches_of(case, arch):
        ptx, shared_bytes, maps = compile_to_ptx(launch.variant, arch)
        expected = results(launch, Compiled(Program(ptx), shared_bytes, tuple(maps)), IN_STEP)
        for mutant in mutants(ptx, most, random):
            caught = judge(launch, mutant.text, arch, expected)
            outcomes[mutant.kind, caught or "survived"] += 1
            if caught is None:
                name = launch.variant.kernel.__name__
                reason = REASONS.get(mutant.kind, "hole")
                print_line(
                    f"sm_{arch} {name} line {mutant.line}: {mutant.kind} survived; {reason}: {mutant.before[:80]}"
                )
    return outcomes


def table(outcomes: Counter) -> list[str]:
    """A line a kind: mutants, how many were caught, and by what."""
    lines = []
    for kind in dict.fromkeys(kind for kind, _ in outcomes):
        by = Counter({caught: n for (k, caught), n in outcomes.items() if k == kind})
        survived = by.pop("survived", 0)
        total = survived + by.total()
        ways = ", ".join(f"{name} {n}" for name, n in by.most_common())
        lines.append(f"{kind}: {total - survived} of {total} ({ways or 'none'})")
    survived = sum(n for (_, caught), n in outcomes.items() if caught == "survived")
    total = outcomes.total()
    lines.append(f"all: {total - survived} of {total} caught, {100 * (total - survived) / max(total, 1):.0f} %")
    return lines
