"""Plants faults in compiled kernels, one instruction at a time, and counts how many the machine catches.

A mutant deletes or changes one instruction. It is caught by a check where executing it is a `Fault`, and by its values where it
gives other bits than the kernel it was made of, in step or shuffled: "wrong results" if one of the cases then fails the numerics
contract, else "other bits". What survives both is printed with its line, and is redundant where redundancy.py proves it so, else a
hole.
"""

import contextlib
import functools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdeit.testing.ptx.cases import Case
from fastdeit.testing.ptx.compiler import Compiled, Variant, compile_to_ptx, compile_variant
from fastdeit.testing.ptx.control_flow import branches_past
from fastdeit.testing.ptx.harness import executing, launches_noted, run_on, storage_of
from fastdeit.testing.ptx.machine import IN_STEP, Fault, Machine, Schedule
from fastdeit.testing.ptx.program import Program, PtxError
from fastdeit.testing.ptx.redundancy import Record, proof
from fastdeit.testing.ptx.selections import Replaced, Scrambled, selections

SHUFFLED = Schedule(seed=11, shuffled=True)
# A mutant without a loop's condition would go on for ever.
_MORE_BRANCHES = 20  # times those of the kernel
_MOST_BRANCHES = 100_000  # of any launch of a case


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


def _doubled(match: re.Match) -> str:
    return match[0].replace(f", {match[1]}, 31", f", {2 * int(match[1])}, 31")


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
    # By 3 more, a butterfly over all lanes would add the same values in another order.
    "shuffle of another lane": (r"^\tshfl\.sync\.bfly.*, (1|2|4|8), 31, -1;", _doubled),
    "swizzle changed": (r"^\txor\.b32 .*, (16|32|64|128);", _add(1, 16)),
}


def kinds_named(texts: Sequence[str]) -> list[str]:
    """The kinds whose name contains one of these texts; all of them without any."""
    return [kind for kind in KINDS if not texts or any(text in kind for text in texts)]


def mutants(
    ptx: str, executed: set[int], most: int, random: np.random.Generator, kinds: Sequence[str] = ()
) -> Iterator[Mutant]:
    """At most so many of every kind that `kinds` names, chosen at random from the lines that are executed."""
    named = kinds_named(kinds)
    for kind, (pattern, change) in KINDS.items():
        found = [m for m in re.finditer(pattern, ptx, re.M) if ptx.count("\n", 0, m.start()) + 1 in executed]
        chosen = sorted(
            random.permutation(len(found))[:most]
        )  # drawn for every kind: the others' choice stays the same
        for index in chosen if kind in named else ():
            match = found[index]
            line = ptx.count("\n", 0, match.start()) + 1
            mutated = ptx[: match.start()] + change(match) + ptx[match.end() :]
            yield Mutant(kind, line, match[0].strip().splitlines()[0], mutated)


class Launch(NamedTuple):
    variant: Variant
    grid: tuple[int, ...]
    args: tuple
    before: list[torch.Tensor]  # the storages' bytes


def launches_of(case: Case, arch: int) -> list[Launch]:
    """The launches of a case with what memory held, one of each kernel and grid and of the numbers it is given."""
    found: dict[tuple, Launch] = {}

    def keep(variant: Variant, grid: tuple, args: tuple) -> None:
        sizes = (variant, grid, *(a for a in args if isinstance(a, int | float)))
        if sizes not in found:
            found[sizes] = Launch(variant, grid, args, [s.clone() for s in _storages(args)])

    torch.manual_seed(0)
    with executing(arch, multiprocessors=1, before_launch=keep):
        case.run()
    return list(found.values())


class Run(NamedTuple):
    results: list[torch.Tensor]  # the storages after the launch
    lines: set[int]  # of the PTX that were executed
    branches: int


def judge(launch: Launch, mutant: str, arch: int, original: Run) -> str | None:
    """How a mutant is caught: the fault's kind, "other bits", or None. It is first executed in step, then shuffled."""
    for schedule in (IN_STEP, SHUFFLED):
        try:
            run = _run(launch, _compiled(launch, mutant, arch), schedule, _MORE_BRANCHES * original.branches)
        except Fault as fault:
            return fault.kind
        except PtxError:
            return "not executable"
        if not all(map(torch.equal, run.results, original.results)):
            return "other bits"
    return None


def _compiled(launch: Launch, text: str, arch: int) -> Compiled:
    _, shared_bytes, maps = compile_to_ptx(launch.variant, arch)
    return Compiled(_parsed(text), shared_bytes, tuple(maps))


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> Program:
    return Program(text)


def _run(launch: Launch, compiled: Compiled, schedule: Schedule, most_branches: int | None = None) -> Run:
    """Executes a launch; its storages are then as before it."""
    with _restored(launch) as storages:
        machine = Machine(compiled.program, compiled.shared_bytes, schedule)
        machine.most_branches = most_branches
        run_on(machine, compiled, launch.grid, launch.args)
        executed = zip(compiled.program.instructions, machine.executed.tolist(), strict=True)
        lines = {instruction.line for instruction, warps in executed if warps}
        return Run([s.clone() for s in storages], lines, machine.branches)


@contextlib.contextmanager
def _restored(launch: Launch) -> Iterator[list[torch.Tensor]]:
    """Storages as they were before the launch, within and afterwards."""
    storages = _storages(launch.args)

    def restore() -> None:
        for storage, held in zip(storages, launch.before, strict=True):
            storage.copy_(held)

    restore()
    try:
        yield storages
    finally:
        restore()


def why_redundant(launches: list[Launch], mutant: Mutant, arch: int) -> str | None:
    """A proof that a mutant that survived is equivalent to the kernel in every one of these launches, or None.

    A launch in which no thread executes the instruction, since its guard is always false, proves nothing.
    """
    found = None
    for launch in launches:
        ptx = compile_to_ptx(launch.variant, arch)[0]
        records = []
        for text in (ptx, mutant.text):
            compiled = _compiled(launch, text, arch)
            record = Record(compiled.program, compiled.shared_bytes, mutant.line)
            with _restored(launch):
                run_on(record, compiled, launch.grid, launch.args)
            records.append(record)
        if not records[0].times:
            continue
        found = proof(mutant.kind, mutant.line, *records)
        if found is None and mutant.kind.startswith("mask"):
            found = _why_unread(launch, _compiled(launch, ptx, arch), mutant.line)
        if mutant.kind == "initialisation dropped":
            found = _why_unused(launch, _compiled(launch, ptx, arch), mutant.line)
        if found is None:
            return None
    return found


def _why_unread(launch: Launch, original: Compiled, line: int) -> str | None:
    """The reason why no result depends on what a mask keeps out."""
    if not selections(original.program, line):
        return None
    machines = [Scrambled(original.program, original.shared_bytes, line, seed) for seed in (0, 1)]
    if not _give_the_same(launch, original, machines):
        return None
    return "redundant for finite numbers: the results have the same bits with random ones where the mask selects zeros"


def _why_unused(launch: Launch, original: Compiled, line: int) -> str | None:
    """The reason why no result depends on what a register holds where a masked load leaves it alone."""
    machines = [Replaced(original.program, original.shared_bytes, line, seed) for seed in (None, 0, 1)]
    if not _give_the_same(launch, original, machines):
        return None
    return "redundant: the results have the same bits with NaN and with random bits as initial values"


def _give_the_same(launch: Launch, original: Compiled, machines: Sequence[Machine]) -> bool:
    """Whether these machines compute what the kernel does, and break no rule."""
    expected = _run(launch, original, IN_STEP).results
    for machine in machines:
        with _restored(launch) as storages:
            try:
                run_on(machine, original, launch.grid, launch.args)
            except Fault:
                return False
            if not all(map(torch.equal, storages, expected)):
                return False
    return True


def contract_fails(cases: list[Case], variant: Variant, mutant: Compiled, arch: int) -> bool:
    """Whether one of these cases fails with a mutant in a kernel's place, executed in step."""

    def compiled(launched: Variant, arch: int) -> Compiled:
        return mutant if launched == variant else compile_variant(launched, arch)

    for case in cases:
        torch.manual_seed(0)
        try:
            with executing(arch, multiprocessors=1, compile_launch=compiled, most_branches=_MOST_BRANCHES):
                case.run()
        except (AssertionError, Fault):
            return True
    return False


def caught_elsewhere(cases: list[Case], variant: Variant, mutant: str, arch: int) -> str | None:
    """How one of these cases that catches a mutant of a kernel catches it, or None. The ragged cases are last, and tried first."""
    for case in reversed(cases):
        torch.manual_seed(0)
        with launches_noted(arch, multiprocessors=1) as launched, contextlib.suppress(AssertionError):
            case.run()  # writes no results, so that a case with several calls ends after the first
        if variant.kernel not in [other.kernel for other in launched]:
            continue
        for launch in launches_of(case, arch):
            if launch.variant == variant:
                original = _run(launch, _compiled(launch, compile_to_ptx(variant, arch)[0], arch), IN_STEP)
                caught = judge(launch, mutant, arch, original)
                if caught == "other bits" and contract_fails([case], variant, _compiled(launch, mutant, arch), arch):
                    return "wrong results"
                if caught:
                    return caught
    return None


def _storages(args: tuple) -> list[torch.Tensor]:
    return [storage_of(a) for a in args if isinstance(a, torch.Tensor | TensorDescriptor)]


def run(
    cases: list[Case],
    arch: int,
    most: int,
    seed: int,
    print_line: Callable[[str], None] = print,
    kinds: Sequence[str] = (),
    rest: list[Case] | None = None,
) -> Counter:
    """Makes mutants of every kernel that these cases launch, and runs each in all of its launches until one catches it.

    Code that the cases do not reach gets none: how much of each kernel they execute is printed, and which branches pass the rest.

    Args:
        cases, arch: what is executed.
        most: mutants of a kind and kernel.
        seed: of the choice among them.
        print_line: receives the report.
        kinds: only those whose name contains one of these; a kind has the same mutants whichever others are left out.
        rest: other cases, which may catch what is else a hole.

    Returns how often each (kind, outcome) happened: what caught it, or "redundant" with a proof, or "hole".
    """
    outcomes: Counter = Counter()
    by_variant: dict[Variant, list[Launch]] = {}
    launching: dict[Variant, list[Case]] = {}
    for case in cases:
        for launch in launches_of(case, arch):
            by_variant.setdefault(launch.variant, []).append(launch)
            if case not in launching.setdefault(launch.variant, []):
                launching[launch.variant].append(case)
    for variant, launches in by_variant.items():
        ptx = compile_to_ptx(variant, arch)[0]
        random = np.random.default_rng([seed, _number(variant)])
        original = [_compiled(launch, ptx, arch) for launch in launches]
        runs = [_run(*pair, IN_STEP) for pair in zip(launches, original, strict=True)]
        executed = set[int]().union(*(run.lines for run in runs))
        instructions = len(original[0].program.instructions)
        print_line(f"sm_{arch} {variant.kernel.__name__}: {len(executed)} of {instructions} instructions are executed")
        for branch in branches_past(original[0].program, executed):
            print_line(f"sm_{arch} {variant.kernel.__name__}: the others are behind {branch}")
        found: Counter = Counter()
        for mutant in mutants(ptx, executed, most, random, kinds):
            caught = next(
                filter(None, (judge(s, mutant.text, arch, r) for s, r in zip(launches, runs, strict=True))), None
            )
            place = f"sm_{arch} {variant.kernel.__name__} line {mutant.line}"
            reason = why_redundant(launches, mutant, arch) if caught is None else None
            if caught is None and reason is None:
                caught = caught_elsewhere(rest or [], variant, mutant.text, arch)
            elif caught == "other bits":
                if contract_fails(launching[variant], variant, _compiled(launches[0], mutant.text, arch), arch):
                    caught = "wrong results"
                else:
                    print_line(f"{place}: {mutant.kind}, within the contract: {mutant.before[:80]}")
            if caught is None:
                reason = reason or "hole: nothing catches it"
                caught = reason.split(":")[0].split()[0]
                print_line(f"{place}: {mutant.kind}, {reason}: {mutant.before[:80]}")
            found[mutant.kind, caught] += 1
        left = sum(n for (_, outcome), n in found.items() if outcome in ("redundant", "hole"))
        print_line(f"sm_{arch} {variant.kernel.__name__}: {found.total() - left} of {found.total()} mutants are caught")
        outcomes += found
    return outcomes


def _number(variant: Variant) -> int:
    """Of a kernel, so that it gets the same mutants whichever others are chosen."""
    return zlib.crc32(repr((variant.kernel.__name__, sorted(variant.unaligned), variant.types, *variant[3:])).encode())


def table(outcomes: Counter) -> list[str]:
    """A row a kind: mutants, how many were caught, and by what; how many are proved redundant; how many are holes."""
    lines = ["| kind | mutants | caught | redundant | holes | by |", "|---|---|---|---|---|---|"]
    kinds = dict.fromkeys(kind for kind, _ in outcomes)
    for kind in [*kinds, None]:
        by: Counter = Counter()
        for (k, outcome), n in outcomes.items():
            by[outcome] += n * (kind in (k, None))
        redundant, holes = by.pop("redundant", 0), by.pop("hole", 0)
        caught, total = by.total(), by.total() + redundant + holes
        ways = ", ".join(f"{name} {n}" for name, n in by.most_common() if n)
        lines.append(f"| {kind or 'all'} | {total} | {caught} | {redundant} | {holes} | {ways} |")
    lines.append(
        f"{caught} of {total} caught ({_share(caught, total)} %), {redundant} proved redundant, {holes} holes: "
    )
    lines[-1] += f"{_share(caught, caught + holes)} % of those that are not redundant"
    return lines


def _share(part: int, whole: int) -> int:
    return 100 * part // max(whole, 1)
