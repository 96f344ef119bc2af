"""The catalogue covers every kernel, and the rules that its figures are judged by."""

import argparse
import ast
import dataclasses
import json
from pathlib import Path

import pytest

from fastdeit.aot import catalog, report, resource_limits
from fastdeit.aot.catalog import Resources
from fastdeit.aot.execution import Accesses, Execution
from fastdeit.commands import kernels
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.kernels.runtime.architecture import LIMITS

KERNELS = Path(__file__).parents[2] / "kernels"
DESCRIPTORS_FROM = 90  # tensor maps exist from this architecture on


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def jit_kernels(path: Path) -> set[str]:
    """Names of the file's functions `..._kernel` with a decorator."""
    return {name for name, node in functions_of(path).items() if name.endswith("_kernel") and node.decorator_list}


def test_every_file_that_ships_configurations_is_listed():
    found = {f"{p.parent.name}.{p.stem}" for p in KERNELS.rglob("*.py") if "aot_configs" in functions_of(p)}
    assert found == set(catalog.KERNEL_FILES)


def test_every_kernel_ships():
    """A kernel that no `aot_configs` names would reach users uncompiled and unmeasured."""
    kernels = {name for path in KERNELS.rglob("*.py") for name in jit_kernels(path)}
    assert "layer_norm_forward_kernel" in kernels
    assert kernels == {row.kernel.__name__ for arch in catalog.ARCHITECTURES for row in catalog.aot_configs(arch)}


@pytest.mark.parametrize("arch", catalog.ARCHITECTURES)
def test_every_kernel_that_an_architecture_can_run_ships_there(arch):
    rows = [row for a in catalog.ARCHITECTURES for row in catalog.aot_configs(a)]
    everywhere = {row.kernel.__name__ for row in rows if not uses_descriptors(row)}
    needed = {row.kernel.__name__ for row in rows} if arch >= DESCRIPTORS_FROM else everywhere
    assert needed <= {row.kernel.__name__ for row in catalog.aot_configs(arch)}


@pytest.mark.parametrize("arch", [a for a in catalog.ARCHITECTURES if a < DESCRIPTORS_FROM])
def test_descriptors_ship_only_where_the_hardware_has_them(arch):
    assert not [row.label for row in catalog.aot_configs(arch) if uses_descriptors(row)]


def uses_descriptors(row: AotConfig) -> bool:
    return any(kind.startswith("tensordesc") for kind in row.signature.values())


def test_at_most_510_configurations():
    """A full sweep takes seconds for each."""
    assert len(report.entries()) <= 510


def test_two_configurations_of_one_name_are_refused(monkeypatch):
    rows = list(catalog.aot_configs(90, ("norm.layer_norm",)))
    monkeypatch.setattr(catalog, "aot_configs", lambda arch, files: [*rows, dataclasses.replace(rows[0], num_warps=8)])
    with pytest.raises(ValueError, match=r"both called layer_norm_forward_kernel \(C=192 bf16\) on sm_90"):
        report.entries((90,), ("norm.layer_norm",))


def test_an_interpreted_kernel_is_not_compiled():
    row = next(catalog.aot_configs(90))
    if isinstance(row.kernel, catalog.JITFunction):
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        catalog.compile_config(row, 90)


@pytest.mark.parametrize(
    "registers, shared, warps, tensor_columns, arch, blocks",
    [
        (106, 41 * 1024, 4, 0, 90, 4),  # 112 registers: 4 warps in each quarter of the register file
        (94, 41 * 1024, 4, 0, 90, 5),
        (168, 114_712 - 1024, 4, 0, 90, 2),  # shared memory: exactly two
        (168, 114_712 + 1024, 4, 0, 90, 1),
        (32, 0, 4, 0, 90, 16),  # threads: 2048
        (32, 0, 1, 0, 89, 24),  # blocks
        (255, 0, 16, 0, 90, 0),  # does not run
        (64, 16 * 1024, 4, 256, 100, 2),  # tensor memory
    ],
)
def test_blocks_per_multiprocessor(registers, shared, warps, tensor_columns, arch, blocks):
    assert catalog._blocks_per_sm(registers, shared, warps, tensor_columns, LIMITS[arch]) == blocks


ROW = AotConfig(catalog.AotConfig, {}, {}, 4, 1, "toy", matrix=True)  # any object with a name stands in for the kernel
GOOD = Resources(128, 0, 40_000, 4, {"HGMMA": 8})


@pytest.mark.parametrize(
    "arch, row, change, expected",
    [
        (90, {}, {}, []),
        (90, {}, dict(spilled_bytes=4), ["spills 4 bytes, allowed 0"]),
        (89, dict(matrix=False), dict(shared_bytes=101_377), ["101377 bytes of shared memory, a block has 101376"]),
        (90, {}, dict(blocks_per_sm=0), ["0 blocks per SM, at least 1 needed"]),
        (90, dict(min_blocks_per_sm=5), {}, ["4 blocks per SM, at least 5 needed"]),
        (90, dict(max_registers=127), {}, ["128 registers, allowed 127"]),
        (90, {}, dict(matrix_instructions={"HMMA": 8}), ["no HGMMA instruction, found HMMA"]),
        (80, {}, dict(matrix_instructions={}), ["no HMMA instruction, found none at all"]),
        (100, {}, dict(matrix_instructions={"UTCHMMA": 4}), []),
        (100, {}, {}, ["no UTC[A-Z]+MMA instruction, found HGMMA"]),
        (90, {}, dict(scalar_products=2), ["2 products without matrix instructions"]),
        (90, dict(matrix=False), dict(matrix_instructions={}), []),
        (90, dict(matrix="HMMA"), dict(matrix_instructions={"HMMA": 2}), []),
        (90, dict(matrix="HMMA"), dict(matrix_instructions={}), ["no HMMA instruction, found none at all"]),
    ],
)
def test_a_breach_of_a_limit_is_named(arch, row, change, expected):
    row, resources = dataclasses.replace(ROW, **row), dataclasses.replace(GOOD, **change)
    assert resource_limits.breaches(row, arch, resources) == expected


def test_the_committed_file_is_one_row_a_line_in_the_report_s_form():
    text = report.RESOURCES_FILE.read_text()
    rows = json.loads(text)["rows"]
    head = text.splitlines()[1]
    assert report.as_json(rows).splitlines()[2:] == text.splitlines()[2:] and "triton" in head
    assert len({(row["kernel"], row["config"], row["arch"]) for row in rows}) == len(rows)
    assert len(text.splitlines()) == len(rows) + 5


def test_the_page_of_executed_rows_is_what_the_committed_file_says():
    page = Path(__file__).parents[2] / "docs" / report.PAGE
    assert page.read_text() == report.committed_page(), f"run: {report.UPDATE_COMMAND}"


EXECUTED = Execution("a case", 1e-3, 1e-3, 0.5, {"float": 7}, Accesses(loaded=8, ideal_loaded=8), Accesses())


@pytest.mark.parametrize(
    "accesses, expected",
    [
        (Accesses(loaded=11, ideal_loaded=10, wavefronts=3, ideal_wavefronts=2), []),
        (Accesses(copied=12, ideal_copied=10), ["1.20 times the ideal sectors, allowed 1.1"]),
        (Accesses(loaded=5, ideal_loaded=5, stored=7, ideal_stored=5), ["1.20 times the ideal sectors, allowed 1.1"]),
        (Accesses(wavefronts=8, ideal_wavefronts=5), ["1.60 times the ideal wavefronts of shared memory, allowed 1.5"]),
    ],
)
@pytest.mark.parametrize("section", ["once", "loop"])
def test_an_excess_is_named(section, accesses, expected):
    execution = dataclasses.replace(EXECUTED, once=Accesses(), loop=Accesses())
    execution = dataclasses.replace(execution, **{section: accesses})
    assert resource_limits.breaches(ROW, 90, dataclasses.replace(GOOD, execution=execution)) == expected


def test_an_exception_allows_as_much_as_it_says(monkeypatch):
    known = (resource_limits.Excess("AotConfig", "to", 1.3, "a reason"),)
    monkeypatch.setattr(resource_limits, "SECTOR_EXCESSES", known)
    for sectors, count in ((13, 0), (14, 1)):
        execution = dataclasses.replace(EXECUTED, once=Accesses(loaded=sectors, ideal_loaded=10))
        assert len(resource_limits.excesses(ROW, 90, dataclasses.replace(GOOD, execution=execution))) == count
    other = dataclasses.replace(ROW, label="other")
    assert resource_limits.excess_of(ROW, known) and not resource_limits.excess_of(other, known)


def test_an_execution_survives_the_file():
    assert Execution.from_dict(json.loads(json.dumps(dataclasses.asdict(EXECUTED)))) == EXECUTED


def test_what_l1_serves_again_does_not_count_for_l2():
    assert Accesses(loaded=20, ideal_loaded=10).l2_ratio == 1 and Accesses(loaded=20, ideal_loaded=10).sector_ratio == 2
    assert Accesses(copied=20, ideal_copied=10).l2_ratio == 2
    assert Accesses(copied=20, ideal_copied=10, tensor_bytes=320).l2_ratio == 1.5
    assert Accesses().l2_ratio == Accesses().wavefront_ratio == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "sm_75"], r"--arch: expected one of sm_80, sm_89, sm_90, sm_100, got 'sm_75'"),
        (["--only", "convolution"], r"--only: expected one of .*layer_norm.*, got 'convolution'"),
    ],
)
def test_an_unknown_choice_is_named(arguments, message):
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        kernels.run(parser.parse_args(arguments))
