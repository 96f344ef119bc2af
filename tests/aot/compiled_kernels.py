"""What the compiler makes of kernels. Run by run_checks.py in a process whose kernels are compiled, not interpreted."""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import tempfile
from pathlib import Path
from unittest import mock

import triton
import triton.language as tl

from fastdeit.aot import catalog, reachable, report, resource_limits, workloads
from fastdeit.aot.catalog import Resources, compile_binary, compile_config, row_key, source_key
from fastdeit.aot.execution import Execution
from fastdeit.aot.instruction_stream import InstructionStream
from fastdeit.commands import kernels
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.testing.ptx import rows as ptx_rows

SAMPLE = 6  # rows that are compiled anew in every run; `fastdeit kernels` compiles all
ENTRIES = report.entries()
COMMITTED = json.loads(report.RESOURCES_FILE.read_text())
OTHER_TRITON = COMMITTED["triton"] != triton.__version__  # figures of another compiler say nothing here


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + i * SIZE + j), tl.load(b_ptr + i * SIZE + j), input_precision=PRECISION)
    tl.store(c_ptr + i * SIZE + j, product)


def product(dtype="*bf16", size=64, precision="ieee", **fields) -> AotConfig:
    signature, constexprs = dict(a_ptr=dtype, b_ptr=dtype, c_ptr="*fp32"), dict(SIZE=size, PRECISION=precision)
    return dataclasses.replace(AotConfig(product_kernel, signature, constexprs, 4, 1, "toy", True), **fields)


def breaches(row: AotConfig, arch: int = 90) -> str:
    return "; ".join(resource_limits.breaches(row, arch, compile_config(row, arch)))


# ---- what ships


def check_the_committed_file_is_current():
    if OTHER_TRITON:
        return
    wanted = {row_key(entry.row, entry.arch): entry.name for entry in ENTRIES}
    held = {row["key"]: row["kernel"] for row in COMMITTED["rows"]}
    missing = [name for key, name in wanted.items() if key not in held]
    extra = [kernel for key, kernel in held.items() if key not in wanted]
    assert not missing and not extra, (
        f"kernels/resources.json is out of date: {len(missing)} configurations are missing or changed {missing[:5]}, "
        f"{len(extra)} no longer ship {extra[:5]}. Run: {report.UPDATE_COMMAND}"
    )


def check_a_sample_compiles_to_the_committed_figures():
    """Keys are hashes, so that the smallest are a fair sample, and another one when the sources change."""
    committed = report.read_committed()
    by_key = {row_key(entry.row, entry.arch): entry for entry in ENTRIES}
    for key in sorted(by_key)[:SAMPLE]:
        entry = by_key[key]
        found = compile_config(entry.row, entry.arch)
        on_record = committed.get(key)
        if on_record is not None:
            stream = on_record.stream or found.stream
            on_record = dataclasses.replace(on_record, stream=stream, execution=None)
        assert OTHER_TRITON or found == on_record, f"{entry.name}: {found}, committed {on_record}"
        assert not resource_limits.breaches(entry.row, entry.arch, found), entry.name


def check_every_configuration_holds_the_limits():
    committed = report.read_committed()
    broken = {
        entry.name: found
        for entry in ENTRIES
        if (resources := committed.get(row_key(entry.row, entry.arch)))
        and (found := resource_limits.breaches(entry.row, entry.arch, resources))
    }
    assert not broken


def check_what_a_pointwise_kernel_streams_it_loads_16_bytes_at_a_time():
    """A hint to the compiler can be lost without a word, and every load is one element wide then."""
    streaming = {
        entry.row.kernel: entry.row
        for entry in ENTRIES
        if entry.arch == 90 and entry.row.constexprs.get("VECTOR") == 16 and not entry.row.matrix
    }
    assert len(streaming) >= 8
    wide = re.compile(r"ld\.global\.v4|cp\.async\.cg\.shared\.global .*, 0x10")
    narrow = [k.__name__ for k, row in streaming.items() if not wide.search(compile_binary(row, 90).asm["ptx"])]
    assert not narrow, narrow


def check_an_allowed_spill_is_one_that_happens():
    committed = report.read_committed()
    by_name = {(e.row.kernel.__name__, e.row.label, e.arch): committed.get(row_key(e.row, e.arch)) for e in ENTRIES}
    for name, (allowed, reason) in resource_limits.ALLOWED_SPILLS.items():
        assert name in by_name and reason
        if by_name[name] is not None:
            assert by_name[name].spilled_bytes == allowed, name


def check_a_shortfall_is_one_that_happens():
    """And no deeper, by three hundredths, than what the compiler makes of the kernels."""
    committed, lowest = report.read_committed(), {}
    for entry in ENTRIES:
        shortfall = resource_limits.shortfall_of(entry.row, entry.arch)
        resources = committed.get(row_key(entry.row, entry.arch))
        if shortfall is not None and resources is not None:
            shares = [x.share for x in workloads.estimates(entry.row, entry.arch, resources).values()]
            lowest[shortfall] = min([lowest.get(shortfall, 1.0), *shares])
    for shortfall in resource_limits.SHORTFALLS if committed else ():
        assert 0 <= lowest[shortfall] - shortfall.lowest_share < 0.03, (shortfall, lowest[shortfall])


def check_an_excess_is_one_that_happens():
    """And no larger, by a tenth, than what was counted."""
    committed = report.read_committed()
    for known, ratio in (
        (resource_limits.SECTOR_EXCESSES, lambda x: x.accesses.sector_ratio),
        (resource_limits.WAVEFRONT_EXCESSES, lambda x: x.accesses.wavefront_ratio),
    ):
        largest = {}
        for entry in ENTRIES:
            excess, resources = (
                resource_limits.excess_of(entry.row, known),
                committed.get(row_key(entry.row, entry.arch)),
            )
            if excess is not None and resources is not None and resources.execution is not None:
                largest[excess] = max(largest.get(excess, 0.0), ratio(resources.execution))
        for excess in known if committed else ():
            assert 0 <= excess.most - largest[excess] < 0.1, (excess, largest[excess])


def check_what_can_be_executed_has_been():
    committed = report.read_committed()
    missing = [
        entry.name
        for entry in ENTRIES
        if (resources := committed.get(row_key(entry.row, entry.arch)))
        and resources.can_be_executed
        and resources.execution is None
    ]
    assert not missing, f"run: {report.UPDATE_COMMAND}"


def check_run_time_integers_are_not_specialised():
    """Else the lengths 1, 16 and 198 would each be compiled, and the direct launch would take one's code for another."""
    specialised = {
        f"{entry.row.kernel.__name__}: {parameter.name}"
        for entry in ENTRIES
        for parameter in entry.row.kernel.params
        if entry.row.signature.get(parameter.name) in ("i32", "i64") and not parameter.do_not_specialize
    }
    assert not specialised, specialised


def check_what_calls_reach_compiles():
    """Two configurations an architecture that the catalog does not list; the full sweep compiles more."""
    for arch in (80, 120):
        rows = reachable.sample(arch, 2, seed=int(triton.__version__.replace(".", "")))
        assert len(rows) == 2 and all(not reachable.faults(row, arch) for row in rows)


# ---- the gate can fail


def check_too_much_shared_memory_of_what_a_call_reaches_is_refused():
    large = product("*fp32", size=128, precision="tf32", num_warps=8)
    assert "of shared memory, a block has" in reachable.faults(large, 89)[0] and not reachable.faults(large, 90)
    assert "does not compile" in reachable.faults(product(size=48), 90)[0]


def check_an_unaligned_pointer_is_another_configuration():
    plain, unaligned = product(), product(unaligned=("a_ptr",))
    assert row_key(plain, 90) != row_key(unaligned, 90)


def check_a_spill_is_found_and_refused():
    found = compile_config(product("*fp32"), 90)  # 64 x 64 multiply-adds from registers
    assert f"spills {found.spilled_bytes} bytes, allowed 0" in resource_limits.breaches(product("*fp32"), 90, found)


def check_a_product_of_multiply_adds_is_refused():
    found = breaches(product("*fp32"), 80)
    assert "no HMMA instruction" in found and "1 products without matrix instructions" in found, found
    found = breaches(product("*fp32", matrix=False))
    assert "no HGMMA" not in found and "1 products without matrix instructions" in found, found


def check_a_product_on_slower_matrix_instructions_is_refused():
    assert "no HGMMA instruction, found HMMA" in breaches(product(size=16))  # wgmma needs 64 rows


def check_a_matrix_product_is_let_through_on_every_architecture():
    for arch in catalog.ARCHITECTURES:
        assert breaches(product(), arch) == "", arch
        assert breaches(product("*fp32", precision="tf32"), arch) == "", arch


def check_limits_of_its_own_are_held():
    found = compile_config(product(), 90)
    assert breaches(product(max_registers=found.registers, min_blocks_per_sm=found.blocks_per_sm)) == ""
    assert "registers" in breaches(product(max_registers=found.registers - 1))
    assert "blocks per SM" in breaches(product(min_blocks_per_sm=found.blocks_per_sm + 1))


def check_too_much_shared_memory_is_refused():
    assert "of shared memory, a block has" in breaches(product("*fp32", size=128, precision="tf32", num_warps=8), 89)


# ---- the command


def nothing_executed(arch: int, wanted: set[str], jobs: int) -> tuple[dict, list[str]]:
    return {}, []


def report_of(*rows: AotConfig, update: Path | None = None, record=nothing_executed, **flags) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `fastdeit kernels` where these rows are all that ships, on one architecture.

    record: stands in for executing them.
    """
    options = dict(
        arch=None,
        only=None,
        json=False,
        committed=False,
        streams=False,
        update=bool(update),
        execute=False,
        sample=0,
        seed=0,
    )
    args = argparse.Namespace(**options | flags)
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(catalog, "aot_configs", lambda arch, files: rows),
        mock.patch.object(report, "entries", lambda *_: [report.Entry("toy", i, 90, r) for i, r in enumerate(rows)]),
        mock.patch.object(report, "RESOURCES_FILE", update or Path("absent.json")),
        mock.patch.object(ptx_rows, "record", record),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        return kernels.run(args), out.getvalue(), err.getvalue()


def check_the_report_has_a_line_per_configuration():
    code, out, _ = report_of(product(), product("*fp16", label="half"))
    header, first, second = out.splitlines()
    assert code == 0 and header.split()[:3] == ["kernel", "config", "arch"], out
    assert first.startswith("product_kernel  toy; 4 warps, 1 stage") and first.endswith("4 HGMMA"), out
    assert "half; 4 warps" in second
    found = json.loads(report_of(product(), json=True)[1])["rows"][0]
    stream = InstructionStream.from_dict(found["stream"])
    facts = {n: found[n] for n in Resources.__dataclass_fields__}
    assert Resources(**facts | dict(stream=stream)) == compile_config(product(), 90)


def check_the_report_fails_where_a_limit_is_broken():
    code, out, err = report_of(product(), product("*fp32", label="slow"))
    assert code == 1 and len(out.splitlines()) == 3
    assert "product_kernel (slow) on sm_90: spills" in err and "product_kernel (toy) on sm_90:" not in err, err


def check_the_report_fails_and_goes_on_where_a_configuration_does_not_compile():
    code, out, err = report_of(product(size=48, label="odd"), product())
    assert code == 1 and len(out.splitlines()) == 2 and "product_kernel (odd) on sm_90: does not compile: " in err, err


def check_an_update_compiles_what_changed_and_drops_what_is_gone():
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "resources.json"
        report_of(product(), product("*fp16", label="half"), update=file)
        first = file.read_text()
        assert report_of(product(), product("*fp16", label="half"), update=file)[2] == ""  # nothing was compiled
        assert file.read_text() == first
        _, _, err = report_of(product(), product("*fp16", size=128, label="half"), update=file)
        assert "[1/1] product_kernel (half)" in err, err
        report_of(product(), update=file)
        assert file.read_text().splitlines()[3].rstrip(",") == first.splitlines()[3].rstrip(",")
        assert len(file.read_text().splitlines()) == len(first.splitlines()) - 1


def check_an_update_executes_what_has_no_counts():
    asked = []

    def record(arch, wanted, jobs):
        asked.append((arch, set(wanted)))
        return {key: Execution("a case", 1e-3, 1e-3, 0.25, {"float": len(asked)}) for key in wanted}, []

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "resources.json"
        first, second = product(), product("*fp16", label="half")
        report_of(first, update=file, record=record)
        report_of(first, second, update=file, record=record)
        assert asked == [(90, {row_key(row, 90)}) for row in (first, second)], asked
        with mock.patch.object(report, "RESOURCES_FILE", file):
            counts = [found.execution.instructions["float"] for found in report.read_committed().values()]
        assert counts == [1, 2], counts
        report_of(first, second, update=file, record=record, execute=True)
        assert asked[-1] == (90, {row_key(row, 90) for row in (first, second)})
        code, _, err = report_of(product(size=128), update=file, record=lambda *_: ({}, ["sm_90, a case: wrong"]))
        assert code == 1 and "sm_90, a case: wrong" in err


# ---- keys and errors

SOURCE = """import triton
import triton.language as tl

FACTOR = tl.constexpr({factor})

@triton.jit
def scaled(x):
    return x * FACTOR{helper}

@triton.jit
def toy_kernel(x_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE){comment}
    tl.store(x_ptr + i, scaled(tl.load(x_ptr + i)))
"""


def key_of(above="", factor=2, helper="", comment="") -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "toy.py"
        path.write_text(above + SOURCE.format(factor=factor, helper=helper, comment=comment))
        spec = importlib.util.spec_from_file_location("toy", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return source_key(module.toy_kernel)


def check_the_key_is_of_what_is_compiled():
    assert key_of() == key_of() == key_of(above="# a line\n\n") == key_of(comment="  # positions")
    assert len({key_of(), key_of(factor=3), key_of(helper=" + 1"), key_of(comment=" + 1")}) == 4
    rows = [product(), product("*fp16"), product(size=32), product(num_warps=8), product(num_stages=2)]
    assert len({row_key(row, arch) for row in rows for arch in (80, 90)}) == 2 * len(rows)
    assert row_key(product(), 90) == row_key(product(label="other", matrix=False), 90)


def check_arguments_that_do_not_fit_the_kernel_are_named():
    for change, expected in (
        (dict(constexprs=dict(SIZE=64)), "no type and no value for argument 'PRECISION'"),
        (dict(signature=dict(a_ptr="*bf16", b_ptr="*bf16", c_ptr="*fp32", d_ptr="*fp32")), "no argument named d_ptr"),
    ):
        try:
            compile_config(product(**change), 90)
        except ValueError as error:
            assert expected in str(error)
        else:
            raise AssertionError(f"accepted: {change}")
