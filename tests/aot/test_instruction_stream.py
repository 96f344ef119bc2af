"""What is read from machine code, on listings small enough to count by hand, and what the limits say of it."""

import dataclasses

import pytest

from fastdeit.aot import instruction_stream, resource_limits, sass, workloads
from fastdeit.aot.catalog import Resources
from fastdeit.aot.devices import DEVICES
from fastdeit.aot.estimate import Workload, estimate
from fastdeit.aot.execution import Accesses, Execution
from fastdeit.aot.instruction_stream import InstructionStream, Section
from fastdeit.cost.formulas import Cost
from fastdeit.kernels.runtime.aot_config import AotConfig

# A copy in a loop of nine instructions, with a slow path of a wait behind the last EXIT.
LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64 R20, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/              @!P3 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128 R12, desc[UR4][R2.64+0x10] ;
        /*0040*/                   FADD R4, R8, R12 ;
        /*0050*/                   MUFU.EX2 R5, R4 ;
        /*0060*/                   FFMA R5, R5, R4, R20 ;
        /*0070*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT, gsb0 ;
        /*0080*/                   STG.E.U16 desc[UR4][R6.64], R5 ;
        /*0090*/                   STG.E.U16 desc[UR4][R6.64+0x2], R5 ;
        /*00a0*/               @P0 BRA `(.L_x_0) ;
        /*00b0*/                   STS.128 [R1], R4 ;
        /*00c0*/                   EXIT ;
.L_x_1:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], R6 ;
        /*00e0*/              @!P0 BRA `(.L_x_1) ;
        /*00f0*/                   BRA `(.L_x_0) ;
"""


def read(listing=LISTING, **changed):
    given = dict(num_warps=4, num_stages=1, blocks_per_sm=2, shared_bytes=0, ptxas_log="", ptx="") | changed
    return instruction_stream.read(sass.parse(listing), **given)


def test_a_listing_is_read():
    found = read()
    assert (found.widest_access, found.narrowest_access, found.narrow_share) == (16, 2, round(4 / 44, 3))
    assert found.loops == 1
    assert found.loop == Section(
        {"matrix": 1, "special": 1, "global": 4, "fp32": 2, "branch": 1},
        matrix_flops=2 * 64 * 16 * 16,
        scattered_bytes=32,
        round_trips=1,
    )
    assert found.once.instructions == {"global": 1, "shared": 1, "branch": 1, "integer": 1}
    assert found.once.shared_bytes == 16 and found.once.round_trips == 0  # R20 has come with what the loop waits for
    assert found.in_flight_bytes == (8 + 16 + 16) * 32 * 4 * 2


def test_a_load_that_is_waited_for_at_once_is_a_trip_of_its_own():
    before, behind = LISTING.split("        /*0030*/")
    other = before + "        /*0028*/ FADD R4, R8, R8 ;\n        /*0030*/" + behind
    assert read(other).loop.round_trips == 2 and read(other).in_flight_bytes < read().in_flight_bytes


def test_stores_of_a_vector_s_width_are_not_scattered():
    assert read(LISTING.replace("STG.E.U16", "STG.E.128")).loop.scattered_bytes == 0


@pytest.mark.parametrize(
    "opcode, kind",
    [
        ("HFMA2.MMA", "convert"),
        ("UTCHMMA.2CTA", "matrix"),
        ("HMMA.16816.F32.BF16", "matrix"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("LDGDEPBAR", "barrier"),
        ("LDS.128", "shared"),
        ("LDL", "local"),
        ("IMAD.MOV.U32", "multiply"),
        ("IADD3", "integer"),
        ("UIADD3", "uniform"),
        ("ELECT", "uniform"),
        ("VOTEU.ANY", "uniform"),
        ("FMNMX.NAN", "compare"),
        ("FADD2", "fp32 pair"),
        ("FADD.FTZ", "fp32"),
        ("UTMACMDFLUSH", "barrier"),
        ("F2FP.BF16.F32.PACK_AB", "convert"),
        ("UTMALDG.4D", "global"),
        ("R2UR", "uniform"),
    ],
)
def test_instructions_have_their_classes(opcode, kind):
    assert sass.Instruction(opcode, "", False).kind == kind


def test_a_text_without_code_is_refused():
    with pytest.raises(ValueError, match="no instruction found"):
        sass.parse("// nothing")


def test_what_ptxas_says_of_wgmma_is_found():
    log = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in the function"
    assert (
        read(ptxas_log=log).serialised == "C7515" and read(ptxas_log="ptxas info : Used 90 registers").serialised == ""
    )


PTX = """
$L__BB0_3:                              // %loop
	cp.async.wait_group 	0;
	bar.sync 	0;
	FENCE
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1;
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd75 + 0 ], SIZE, %r193;
	@%p5 bra 	$L__BB0_3;
"""


@pytest.mark.parametrize(
    "fence, size, unfenced",
    [("", "0x10", 1), ("fence.proxy.async.shared::cta;", "0x10", 0), ("", "0x4", 0)],
)
def test_a_missing_proxy_fence_is_found(fence, size, unfenced):
    assert read(ptx=PTX.replace("FENCE", fence).replace("SIZE", size)).unfenced == unfenced


# ---- the estimate


def stream(**once):
    return InstructionStream(once=Section(**once))


def test_a_copy_runs_at_the_memory_s_rate():
    device, work = DEVICES[90], Workload(10**5, 0, Cost(0, 10**9, 1))
    found = estimate(stream(instructions={"global": 4}, round_trips=1), {}, 4, 16, work, device)
    assert found.bound == "memory" and 0.97 < found.share < 1
    assert found.floor == pytest.approx(1e9 / device.memory_tb_per_s / 1e6)


@pytest.mark.parametrize(
    "section, bound",
    [
        (dict(instructions={"special": 200}), "special function"),
        (dict(instructions={"integer": 400}), "integer"),
        (dict(instructions={"branch": 400}), "issue"),
        (dict(instructions={"global": 8}, round_trips=40), "latency"),
        (dict(instructions={"global": 8}, scattered_bytes=128), "L2"),
    ],
)
def test_what_is_scarce_is_the_bound(section, bound):
    # 128 threads of 8 bytes each
    found = estimate(stream(**section), {}, 4, 4, Workload(10**6, 0, Cost(0, 10**9, 1)), DEVICES[90])
    assert found.bound == bound and found.share < 0.8


def executed(once=None, loop=None):
    return Execution("case", 0.0, 0.0, 0.0, {}, Accesses(**once or {}), Accesses(**loop or {}))


def test_sectors_beyond_the_ideal_take_longer_in_l2():
    """Sectors that are loaded twice come from L1, and take nothing."""
    device, work = DEVICES[90], Workload(10**6, 0, Cost(0, 10**9, 1))

    def estimated(**accesses):
        return estimate(stream(instructions={"global": 8}), {}, 4, 16, work, device, executed(accesses))

    ideal, copied = estimated(copied=100, ideal_copied=100), estimated(copied=400, ideal_copied=100)
    assert copied.bound == "L2" and copied.share < 0.6 < ideal.share
    assert estimated(loaded=400, ideal_loaded=100) == ideal
    assert estimated(stored=400, ideal_stored=100) == copied


@pytest.mark.parametrize("part", ["once", "loop"])
def test_wavefronts_beyond_the_ideal_take_longer_where_they_are(part):
    device, work = DEVICES[90], Workload(10**5, 10, Cost(0, 10**6, 1))
    found = InstructionStream(**{part: Section({"shared": 80}, shared_bytes=3200)})
    conflicts = dict(wavefronts=300, ideal_wavefronts=100)
    other = {"once": "loop", "loop": "once"}[part]
    free, here, there = (
        estimate(found, {}, 4, 16, work, device, execution)
        for execution in (executed(), executed(**{part: conflicts}), executed(**{other: conflicts}))
    )
    assert free.bound == "shared memory" and free == there
    assert 2.5 < here.microseconds / free.microseconds < 3.1


def test_serialised_products_take_longer():
    """Without overlap the products and what stands between them add up."""
    device, work = DEVICES[90], Workload(10**5, 10, Cost(10**13, 10**6, 1))
    plain = InstructionStream(loop=Section({"special": 80}, matrix_flops=2**21), loops=1, asynchronous=True)
    overlapped, serialised = (
        estimate(x, {"HGMMA": 8}, 4, 4, work, device) for x in (plain, dataclasses.replace(plain, serialised="C7515"))
    )
    assert overlapped.bound == serialised.bound == "special function"
    assert 1.2 < serialised.microseconds / overlapped.microseconds < 2


def test_half_the_grid_takes_half_the_time():
    loop = InstructionStream(loop=Section({"fp32": 100}, round_trips=1), loops=1)
    times = [
        estimate(loop, {}, 4, 8, Workload(n, 100, Cost(0, 1, 1)), DEVICES[80]).microseconds for n in (10**5, 2 * 10**5)
    ]
    assert times[1] / times[0] == pytest.approx(2, rel=0.01)


def test_every_default_launch_is_one_that_ships():
    from fastdeit.aot import report

    for arch, device in DEVICES.items():
        shipped = {(entry.row.kernel.__name__, entry.row.label) for entry in report.entries((arch,))}
        launches = list(workloads.launches(arch, device))
        assert launches and {(x.kernel, x.label) for x in launches} <= shipped
        for launch in launches:
            assert launch.work.programs > 0 and launch.work.cost.bytes > 0


# ---- the goals

ROW = AotConfig(sass.parse, {}, {}, 4, 1, "toy", matrix=False)  # any object with a name stands in for the kernel
GOOD = InstructionStream(widest_access=16, narrowest_access=16)


@pytest.mark.parametrize(
    "matrix, change, expected",
    [
        (False, {}, []),
        (False, dict(narrow_share=0.08), []),
        (False, dict(narrow_share=1.0), ["2-byte accesses move 100% of its bytes, allowed 10%"]),
        (True, dict(narrow_share=1.0), []),
        (True, dict(serialised="C7515"), ["serialised matrix products: ptxas says C7515"]),
        (True, dict(unfenced=1), ["unfenced: 1 loops multiply copied tiles without fence.proxy.async"]),
    ],
)
def test_a_missed_goal_is_named(matrix, change, expected):
    row, resources = (
        dataclasses.replace(ROW, matrix=matrix),
        Resources(64, 0, 0, 4, stream=dataclasses.replace(GOOD, **change)),
    )
    assert resource_limits.missed_goals(row, 90, resources) == expected


def test_a_slow_default_kernel_misses_its_goal(monkeypatch):
    slow = workloads.Launch("parse", "toy", "B", Workload(10**6, 0, Cost(0, 10**9, 1)))
    monkeypatch.setattr(workloads, "_by_configuration", lambda arch: {("parse", "toy"): [slow]})
    resources = Resources(64, 0, 0, 4, stream=stream(instructions={"special": 200}))
    (phrase,) = resource_limits.missed_goals(ROW, 90, resources)
    assert phrase.startswith("estimated ") and "of the floor in DeiT-B, bound by special function" in phrase
    assert phrase in resource_limits.breaches(ROW, 90, resources)

    def known(lowest_share):
        shortfall = resource_limits.Shortfall("par", (90,), lowest_share, "a reason")
        monkeypatch.setattr(resource_limits, "SHORTFALLS", (shortfall,))
        return resource_limits.missed_goals(ROW, 90, resources)

    reached = workloads.estimates(ROW, 90, resources)["B"].share
    assert known(reached) == [] and resource_limits.breaches(ROW, 90, resources) == []
    (worse,) = known(reached + 0.01)  # a known shortfall may not grow
    assert worse.startswith("estimated ") and worse.endswith("wanted")


def test_exceptions_are_few_and_have_reasons():
    reasons = [shortfall.reason for shortfall in resource_limits.SHORTFALLS] + [
        *resource_limits.ALLOWED_NARROW.values()
    ]
    assert len(reasons) <= 6 and all(reasons)


def test_figures_without_a_stream_miss_no_goal():
    assert resource_limits.missed_goals(ROW, 90, Resources(64, 0, 0, 4)) == []
