"""What proves a planted fault harmless, each with a kernel where it holds and one where it does not; and the table of faults."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdeit.testing.ptx import mutations, redundancy
from fastdeit.testing.ptx.cases import Case
from fastdeit.testing.ptx.compiler import Variant
from fastdeit.testing.ptx.harness import storage_of
from fastdeit.testing.ptx.machine import Fault
from fastdeit.testing.ptx.mutations import KINDS, Launch, mutants, table
from fastdeit.testing.ptx.redundancy import Record, Touch
from fastdeit.testing.ptx.selections import Replaced
from tests.testing.ptx.conftest import program_of, text_of

LANES = np.arange(64, dtype=np.uint32)


@pytest.fixture
def recorded(execute):
    """recorded(body, marked): the record of a run, and the line of the last instruction that begins with `marked`."""

    def run(body, marked, **options):
        found = []

        def make(program, shared):
            lines = [i.line for i in program.instructions if i.text.startswith(marked)]
            found.append((Record(program, shared, max(lines, default=0)), max(lines, default=0)))
            return found[0][0]

        execute(body, {"%r1": LANES}, threads=64, shared=1024, make=make, **options)
        return found[0]

    return run


OWN = "shl.b32 %r30, %tid, 2;\nst.shared.b32 [%r30], %r1;\n{}\nxor.b32 %r31, %r30, {};\nld.shared.b32 %r2, [%r31];\n{}"


GLOBAL = """ld.param.u64 %rd1, [p0];
    xor.b32 %r30, %tid, {};
    mad.wide.u32 %rd2, %r30, 4, %rd1;
    st.global.b32 [%a0], %r1;
    bar.sync 0;
    ld.global.b32 %r2, [%rd2];"""


@pytest.mark.parametrize(
    "body, proved",
    [
        (GLOBAL.format(0), True),  # of each thread's own element
        (GLOBAL.format(32), False),
        (OWN.format("bar.sync 0;", 0, ""), True),  # each thread reads its own word
        (OWN.format("bar.sync 0;", 128, ""), False),
        (OWN.format("bar.sync 0;\nbar.sync 0;", 128, ""), True),  # the second of two
        (OWN.format("bar.sync 0;", 128, "bar.sync 0;"), True),  # nothing follows
        (OWN.format("bar.sync 0;", 128, "bar.sync 0;\nst.shared.b32 [%r30], %r2;"), False),
        (OWN.format("bar.sync 0;", 128, "bar.sync 0;\nst.shared.b32 [%r30+512], %r2;"), True),  # another place
    ],
)
def test_a_barrier_orders_accesses_of_two_threads_or_nothing(recorded, body, proved):
    record, line = recorded(body, "bar.sync")
    assert bool(redundancy.barrier_orders_nothing(record, line)) == proved


@pytest.mark.parametrize("barriers, proved", [(0, False), (1, True), (64, True)])
def test_other_barriers_order_what_one_stands_between(barriers, proved):
    """Addresses of tensors begin at 1 << 38."""
    both, place = np.array([0, 1]), np.array([[1 << 38]])

    def touch(kind, line, lanes, words):
        return Touch(kind, line, lanes, words, kind == "global", False)

    def barrier(line):
        return touch("barrier", line, both, np.zeros((2, 0), np.int64))

    touches = [
        touch("global", 1, both[:1], place),
        barrier(9),
        *[barrier(5)] * barriers,
        touch("global", 2, both[1:], place),
    ]
    assert bool(redundancy.barrier_orders_nothing(SimpleNamespace(touches=[touches], threads=2), 9)) == proved


COPIES = """shl.b32 %r30, %tid, 2;
    cp.async.ca.shared.global [%r30], [%a0], 0x4;
    cp.async.commit_group;
    {0}
    {1}
    cp.async.wait_group 0;"""


def test_a_wait_is_redundant_where_what_it_waits_for_completes_later(recorded):
    with_wait, _ = recorded(COPIES.format("cp.async.wait_group 0;", ""), "cp.async.wait")
    without, line = recorded(COPIES.format("", ""), "cp.async.wait")
    reason = redundancy.completes_elsewhere(with_wait, without)
    assert reason and f"line {line}," in reason


def test_a_commit_of_nothing_changes_no_completion(recorded):
    both, _ = recorded(COPIES.format("cp.async.commit_group;", ""), "cp.async.wait")
    one, _ = recorded(COPIES.format("", ""), "cp.async.wait")
    assert "same wait" in redundancy.completes_elsewhere(both, one)


def test_what_never_completes_is_no_redundancy(recorded):
    whole, _ = recorded(
        "shl.b32 %r30, %tid, 2;\ncp.async.ca.shared.global [%r30], [%a0], 0x4;\ncp.async.commit_group;\n"
        "cp.async.wait_group 0;",
        "cp.async.wait",
    )
    none, _ = recorded("mov.b32 %r30, 0;", "mov")
    assert redundancy.completes_elsewhere(whole, none) is None


@pytest.mark.parametrize("bound, same", [(64, True), (62, False), (63, False)])
def test_a_widened_mask_is_redundant_where_no_thread_meets_the_bound(recorded, bound, same):
    narrow, _ = recorded(f"setp.lt.s32 %p1, %r1, {bound};", "setp", outputs=["%p1"])
    wide, _ = recorded(f"setp.le.s32 %p1, %r1, {bound};", "setp", outputs=["%p1"])
    assert bool(redundancy.same_values(narrow, wide)) == same


def test_a_store_gives_the_same_only_at_the_same_address(recorded):
    body = "shl.b32 %r30, %tid, 2;\nst.shared.b32 [%r30{}], %r1;"
    here, there = (recorded(body.format(at), "st.shared")[0] for at in ("", "+4"))
    assert redundancy.same_values(here, here)
    assert redundancy.same_values(here, there) is None


@pytest.mark.parametrize("bound, times", [(64, 64), (3, 3), (0, 0)])
def test_threads_whose_guard_is_false_do_not_execute(recorded, bound, times):
    body = f"setp.lt.s32 %p1, %r1, {bound};\nshl.b32 %r30, %tid, 2;\n@%p1 st.shared.b32 [%r30], %r1;"
    record, _ = recorded(body, "@%p1 st.shared")
    assert record.times == times


INITIAL = """mov.b32 %r2, 0;
    setp.lt.s32 %p1, %r1, 5;
    @%p1 ld.global.b32 %r2, [%a0];
    {}"""


@pytest.mark.parametrize("behind, reaches", [("", True), ("selp.b32 %r2, %r2, 7, %p1;", False)])
def test_bits_in_the_place_of_an_initial_value_reach_a_result_or_not(execute, behind, reaches):
    def replaced(seed):
        def make(program, shared):
            line = next(i.line for i in program.instructions if i.text.startswith("mov.b32 %r2"))
            return Replaced(program, shared, line, seed)

        return make

    (expected,) = execute(INITIAL.format(behind), {"%r1": LANES}, ["%r2"], threads=64)
    found = [
        execute(INITIAL.format(behind), {"%r1": LANES}, ["%r2"], threads=64, make=replaced(s))[0] for s in (None, 0, 1)
    ]
    for values in found:
        assert (values[:5] == LANES[:5]).all()
        assert (values == expected).all() == (not reaches)
    if reaches:
        assert (found[0][5:] == 0xFFFFFFFF).all() and (found[1] != found[2]).any()


LOOP = """mov.b32 %r30, 0;
    $L__BB0_1:
    setp.lt.s32 %p2, %r30, {inside};
    @%p2 st.global.b32 [%a0], %r1;
    add.s32 %r30, %r30, 1;
    setp.{compare}.s32 %p1, %r30, 3;
    @%p1 bra $L__BB0_1;"""


@pytest.mark.parametrize("inside, proved", [(3, True), (4, False)])
def test_a_loop_may_make_a_pass_that_accesses_nothing(recorded, inside, proved):
    runs = {
        name: recorded(LOOP.format(inside=inside, compare=name), f"setp.{name}.s32 %p1")[0] for name in ("lt", "le")
    }
    assert redundancy.same_values(runs["lt"], runs["le"]) is None
    assert bool(redundancy.pass_accesses_nothing(runs["lt"], runs["le"])) == proved


BOUND = """setp.{compare}.s32 %p1, %r1, 9;
    selp.b32 %r31, 3, 0, %p1;
    mov.b32 %r30, 0;
    setp.lt.s32 %p2, %r31, 1;
    @%p2 bra $L__BB0_2;
    $L__BB0_1:
    setp.lt.s32 %p3, %r1, {inside};
    @%p3 st.global.b32 [%a0], %r30;
    add.s32 %r30, %r30, 1;
    setp.lt.s32 %p4, %r30, %r31;
    @%p4 bra $L__BB0_1;
    $L__BB0_2:
    {behind}"""


@pytest.mark.parametrize(
    "inside, behind, proved",
    [(9, "", True), (10, "", False), (9, "selp.b32 %r32, 1, 0, %p1;\nadd.s32 %r33, %r32, 1;", False)],
)
def test_a_loop_may_be_entered_where_it_accesses_nothing(recorded, inside, behind, proved):
    runs = {
        name: recorded(BOUND.format(inside=inside, compare=name, behind=behind), f"setp.{name}.s32 %p1")[0]
        for name in ("lt", "le")
    }
    assert redundancy.same_values(runs["lt"], runs["le"]) is None
    assert bool(redundancy.pass_accesses_nothing(runs["lt"], runs["le"])) == proved


COPY = """setp.{compare}.s32 %p1, %r1, 5;
    selp.b32 %r2, 4, 0, %p1;
    shl.b32 %r30, %tid, 2;
    cp.async.ca.shared.global [%r30], [%a0], 0x4, %r2;
    cp.async.commit_group;
    cp.async.wait_group 0;
    {behind}"""


@pytest.mark.parametrize(
    "behind, proved",
    [
        ("setp.lt.s32 %p2, %r1, 5;\n@%p2 ld.shared.b32 %r3, [%r30];", True),
        ("ld.shared.b32 %r3, [%r30];", False),
        ("selp.b32 %r3, 1, 0, %p1;\nadd.s32 %r4, %r3, 1;", False),  # the mask reaches a register
    ],
)
def test_a_mask_of_copies_is_redundant_where_nothing_reads_them(recorded, behind, proved):
    runs = {
        name: recorded(COPY.format(compare=name, behind=behind), f"setp.{name}.s32 %p1")[0] for name in ("lt", "le")
    }
    assert bool(redundancy.copies_are_not_read(runs["lt"], runs["le"])) == proved


def test_only_a_loop_makes_passes(recorded):
    narrow, _ = recorded("setp.lt.s32 %p1, %r1, 9;", "setp", outputs=["%p1"])
    wide, _ = recorded("setp.le.s32 %p1, %r1, 9;", "setp", outputs=["%p1"])
    assert redundancy.pass_accesses_nothing(narrow, wide) is None


MBARRIER = """setp.eq.b32 %p1, %tid, 0;
    mov.b32 %r40, 512;
    @%p1 mbarrier.init.shared::cta.b64 [%r40], 1;
    bar.sync 0;
    @%p1 mbarrier.inval.shared::cta.b64 [%r40];
    bar.sync 0;
    shl.b32 %r30, %tid, 2;
    st.shared.b32 [%r30+{}], %r1;"""


@pytest.mark.parametrize("at, unused", [(0, True), (384, False)])
def test_an_invalidation_is_redundant_where_its_bytes_are_not_used_again(recorded, at, unused):
    record, line = recorded(MBARRIER.format(at), "@%p1 mbarrier.inval")
    assert bool(redundancy.memory_is_not_used_again(record, line)) == unused


@pytest.mark.parametrize("at, unread", [(512, True), (0, False)])
def test_a_copy_is_redundant_where_nothing_reads_it(recorded, at, unread):
    body = COPIES.format("", "") + f"\nst.shared.b32 [%r30+512], %r1;\nld.shared.b32 %r2, [%r30+{at}];"
    body += "\nld.global.b32 %r3, [%a0];"  # its source is no copy
    record, line = recorded(body, "cp.async.ca")
    assert bool(redundancy.copy_is_not_read(record, line)) == unread


@pytest.mark.parametrize(
    "before, nothing",
    [
        ([("generic", 3)], False),
        ([("generic", 4)], True),  # another word
        ([("asynchronous", 3), ("mbarrier", 3)], True),
        ([("generic", 3), ("fence", None)], True),  # an earlier fence has ordered it
        ([("generic", 3), ("barrier", None)], False),
    ],
)
def test_a_proxy_fence_orders_loads_and_stores_before_asynchronous_accesses_or_nothing(before, nothing):
    lanes, line = np.array([0]), 9

    def touch(kind, word, line=1):
        return Touch(kind, line, lanes, np.array([[] if word is None else [word]], np.int64), False, False)

    touches = [*(touch(*each) for each in before), touch("fence", None, line), touch("asynchronous", 3)]
    record = SimpleNamespace(touches=[touches])
    assert bool(redundancy.fence_orders_nothing(record, line)) == nothing


def wgmma(first="", second=""):
    """Two products on the same registers, each behind a fence."""
    results = "{" + ", ".join(f"%r{100 + i}" for i in range(4)) + "}"
    left = "{%r200, %r201, %r202, %r203}"
    product = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {results}, {left}, %rd1, 0, 1, 1, 0;"
    rest = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"
    fence = "wgmma.fence.sync.aligned;"
    return f"{first}\n{fence}\n{product}\n{rest}\n{second}\n{fence}\n{product}\n{rest}"


@pytest.mark.parametrize(
    "between, fenced",
    [("", True), ("mov.b32 %r300, 0;", True), ("mov.b32 %r100, 0;", False), ("add.s32 %r300, %r201, 1;", False)],
)
def test_a_fence_is_redundant_where_its_registers_were_not_accessed_since_the_last(between, fenced):
    program = program_of(wgmma(second=between), [], [], 128)
    line = max(i.line for i in program.instructions if i.opcode.startswith("wgmma.fence"))
    assert bool(redundancy.registers_were_fenced(program, line)) == fenced
    first = min(i.line for i in program.instructions if i.opcode.startswith("wgmma.fence"))
    assert redundancy.registers_were_fenced(program, first) is None  # none before it


def test_every_mutant_differs_in_its_line_alone():
    text = "\n".join(["\tbar.sync \t0;", "\tsetp.lt.s32 \t%p8, %r91, %r63;", "\tbar.sync \t0;", "\tbar.sync \t0;"])
    made = list(mutants(text, {1, 2, 3, 4}, 2, np.random.default_rng(0)))
    assert Counter(m.kind for m in made) == {"bar.sync dropped": 2, "mask widened": 1, "mask dropped": 1}
    for mutant in made:
        before, after = text.split("\n"), mutant.text.split("\n")
        differ = [i for i, (a, b) in enumerate(zip(before, after, strict=True), 1) if a != b]
        assert differ == [mutant.line] and mutant.before == before[mutant.line - 1].strip()
        assert mutant.kind in KINDS


def test_code_that_is_not_executed_gets_no_mutants():
    text = "\n".join(["\tbar.sync \t0;", "\tbar.sync \t0;"])
    assert [m.line for m in mutants(text, {2}, 5, np.random.default_rng(0))] == [2]


def test_another_lane_is_one_that_a_butterfly_reads_twice():
    text = "\tshfl.sync.bfly.b32 \t%r42, %r41, 8, 31, -1;"
    (mutant,) = mutants(text, {1}, 1, np.random.default_rng(0))
    assert mutant.text == text.replace(" 8,", " 16,")


TEXT = "\n".join(["\tbar.sync \t0;", "\tsetp.lt.s32 \t%p8, %r91, %r63;", "\tcp.async.wait_group \t1;"] * 20)


def variant_of(name):
    """What a kernel of this name compiles to."""
    return Variant(type("Kernel", (), {"__name__": name})(), (), frozenset(), 4, 1)


def chosen(seed=0, kinds=(), kernel="layer_norm_forward"):
    """(kind, line) of the mutants of a kernel with this text that `run` plants."""
    found = []
    variant = variant_of(kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mutations, "launches_of", lambda case, arch: [SimpleNamespace(variant=variant)])
        patch.setattr(mutations, "compile_to_ptx", lambda variant, arch: (TEXT, 0, []))
        patch.setattr(
            mutations, "_compiled", lambda launch, text, arch: SimpleNamespace(program=SimpleNamespace(instructions=[]))
        )
        patch.setattr(mutations, "_run", lambda launch, compiled, schedule: SimpleNamespace(lines=set(range(1, 61))))
        patch.setattr(mutations, "branches_past", lambda program, executed: [])
        patch.setattr(mutations, "judge", lambda launch, mutant, arch, original: "shared race")
        make = mutations.mutants

        def noted(*args):
            for mutant in make(*args):
                found.append((mutant.kind, mutant.line))
                yield mutant

        patch.setattr(mutations, "mutants", noted)
        outcomes = mutations.run([Case("a", None)], 90, 3, seed, print_line=lambda line: None, kinds=kinds)
    assert outcomes == Counter((kind, "shared race") for kind, _ in found)
    return found


def test_a_kind_has_the_same_mutants_whichever_others_are_left_out():
    every = chosen()
    assert Counter(kind for kind, _ in every) == Counter(
        dict.fromkeys(
            [
                "bar.sync dropped",
                "cp.async.wait_group dropped",
                "cp.async.wait_group weakened",
                "mask widened",
                "mask dropped",
            ],
            3,
        )
    )
    for texts in (["mask"], ["widened"], ["dropped"], ["mask d", "wait_group w"], ["bar.sync"]):
        assert chosen(kinds=texts) == [pair for pair in every if any(text in pair[0] for text in texts)]


def test_a_seed_fixes_the_choice_of_mutants_in_each_kernel():
    assert chosen(seed=0) == chosen(seed=0)
    others = [chosen(seed=1), chosen(seed=2), chosen(kernel="layer_norm_backward")]
    assert all(other != chosen(seed=0) for other in others) and others[0] != others[1]
    assert all(Counter(k for k, _ in other) == Counter(k for k, _ in chosen(seed=0)) for other in others)


@pytest.mark.parametrize("other, outcome", [(0, "redundant"), (1, "global race"), (32, "global race")])
def test_a_barrier_that_orders_accesses_to_global_memory_alone_is_missed(monkeypatch, other, outcome):
    text, x = text_of(GLOBAL.format(other), ["%r1"], ["%r2"], 64), torch.arange(64, dtype=torch.int32)
    args = (x, torch.zeros(64, dtype=torch.int32))
    launch = Launch(variant_of("exchange"), (1,), args, [storage_of(a).clone() for a in args])
    monkeypatch.setattr(mutations, "launches_of", lambda case, arch: [launch])
    monkeypatch.setattr(mutations, "compile_to_ptx", lambda variant, arch: (text, 0, []))
    found = mutations.run([Case("a", None)], 90, 1, 0, print_line=lambda line: None, kinds=["bar.sync"])
    assert found == Counter({("bar.sync dropped", outcome): 1})


@pytest.mark.parametrize(
    "raised, fails",
    [(None, False), (AssertionError("beyond the limit"), True), (Fault("race", "two threads", None), True)],
)
def test_a_mutant_fails_the_contract_where_a_case_fails_with_it(monkeypatch, raised, fails):
    given, ran = [], []

    @contextlib.contextmanager
    def executing(arch, *, compile_launch, **_):
        given.append([compile_launch(name, arch) for name in ("its kernel", "another")])
        yield

    def run():
        ran.append(1)
        if raised and len(ran) == 2:
            raise raised

    monkeypatch.setattr(mutations, "executing", executing)
    monkeypatch.setattr(mutations, "compile_variant", lambda variant, arch: f"{variant} for {arch}")
    assert mutations.contract_fails([Case("a", run), Case("b", run)], "its kernel", "the mutant", 90) == fails
    assert given == [["the mutant", "another for 90"]] * 2  # the first case passed


@pytest.mark.parametrize(
    "judged, fails, expected",
    [(None, False, None), ("shared race", False, "shared race"), ("other bits", True, "wrong results")],
)
def test_a_mutant_is_tried_in_the_other_cases_that_launch_its_kernel(monkeypatch, judged, fails, expected):
    noted, tried = [], []
    own, another = (SimpleNamespace(kernel="its kernel", types=types) for types in ("bf16", "fp32"))

    @contextlib.contextmanager
    def launches_noted(arch, multiprocessors):
        noted.clear()
        yield noted

    def launches_of(case, arch):
        tried.append(case.name)
        return [SimpleNamespace(variant=another), SimpleNamespace(variant=own)]

    monkeypatch.setattr(mutations, "launches_noted", launches_noted)
    monkeypatch.setattr(mutations, "launches_of", launches_of)
    monkeypatch.setattr(mutations, "compile_to_ptx", lambda variant, arch: (variant, 0, []))
    monkeypatch.setattr(mutations, "_compiled", lambda launch, text, arch: text)
    monkeypatch.setattr(mutations, "_run", lambda launch, compiled, schedule: compiled)
    monkeypatch.setattr(mutations, "contract_fails", lambda cases, variant, compiled, arch: fails)
    monkeypatch.setattr(
        mutations,
        "judge",
        lambda launch, mutant, arch, original: judged if launch.variant is original is own else "wrong",
    )
    cases = [Case("with it", lambda: noted.append(another)), Case("without it", lambda: None)]
    assert mutations.caught_elsewhere(cases, own, "the mutant", 90) == expected
    assert tried == ["with it"]


def test_the_table_counts_what_was_caught_proved_and_neither():
    outcomes = Counter({("a", "shared race"): 3, ("a", "hole"): 1, ("b", "redundant"): 4, ("b", "other bits"): 2})
    assert table(outcomes) == [
        "| kind | mutants | caught | redundant | holes | by |",
        "|---|---|---|---|---|---|",
        "| a | 4 | 3 | 0 | 1 | shared race 3 |",
        "| b | 6 | 2 | 4 | 0 | other bits 2 |",
        "| all | 10 | 5 | 4 | 1 | shared race 3, other bits 2 |",
        "5 of 10 caught (50 %), 4 proved redundant, 1 holes: 83 % of those that are not redundant",
    ]


def test_a_record_computes_as_a_machine_does(execute):
    (plain,) = execute(OWN.format("bar.sync 0;", 128, ""), {"%r1": LANES}, ["%r2"], threads=64, shared=1024)
    (same,) = execute(OWN.format("bar.sync 0;", 128, ""), {"%r1": LANES}, ["%r2"], threads=64, shared=1024, make=Record)
    assert (plain == LANES ^ 32).all() and (same == plain).all()
