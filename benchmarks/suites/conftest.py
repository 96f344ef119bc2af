"""`compare`, the fixture that every suite measures with, and the order and limits of a run; the method itself is in timing.py.

A suite is a file test_<suite>.py with one parametrized test, its cases in the order of importance, and two numbers: `QUICK`, how
many of them the short run has, and `TURNS`, how many of them are measured for each one of a suite that says 1.
"""

import functools
import math
import time
from pathlib import Path

import pytest
import torch

from fastdeit.benchmarks import machine, results_folder, roofline, runner, timing
from fastdeit.benchmarks.baselines import op_baselines as baselines

SUITES = (
    "model",
    "training",
    "inference",
    "attention",
    "block",
    "mlp",
    "layer_norm",
    "distillation",
    "embedding",
    "augment",
    "gemm",
    "quantization",
)  # in a round, this order
_LEAST_SECONDS = 8  # for which a case is begun
_LINE = pytest.StashKey[str]()


def pytest_addoption(parser):
    parser.addoption(
        "--toy", action="store_true", help="tiny shapes on the CPU: shows that the suites run, measures nothing"
    )
    parser.addoption("--quick", action="store_true", help="each suite's most important cases")
    parser.addoption("--out", type=Path, help="folder of results; cases that it has are not measured again")
    for name, meaning in (
        ("--seconds", "for everything"),
        ("--case-seconds", "for a case"),
        ("--candidate-seconds", "to set up a candidate"),
    ):
        parser.addoption(name, type=float, default=math.inf, help=meaning)


def pytest_configure(config):
    config.bench_end = time.monotonic() + config.getoption("--seconds")
    out = config.getoption("--out")
    config.bench_folder = None if out is None else results_folder.Folder(out)


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items):
    if not (torch.cuda.is_available() or config.getoption("--toy")):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, or --toy"))
        return
    ranked = _ranked(items)
    kept = [item for item, rank in ranked if not config.getoption("--quick") or rank < item.module.QUICK]
    folder = config.bench_folder
    if folder is not None:
        folder.plan([_case(item) for item in kept])
        kept = [item for item in kept if not folder.is_done(_case(item), config.getoption("--quick"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _ranked(items) -> list[tuple[pytest.Item, int]]:
    """Each with its rank in its suite; suites take turns, and one whose cases are short has several in a round."""
    ranks: dict[str, int] = {}
    ranked = []
    for item in items:
        suite = _suite(item)
        ranked.append((item, ranks.setdefault(suite, 0)))
        ranks[suite] += 1
    return sorted(ranked, key=lambda pair: (pair[1] // pair[0].module.TURNS, SUITES.index(_suite(pair[0]))))


def _suite(item) -> str:
    return item.path.stem.removeprefix("test_")


def _case(item) -> str:
    return f"{_suite(item)}-{item.callspec.id}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    config, folder = item.config, item.config.bench_folder
    if folder is not None:
        if config.bench_end - time.monotonic() < _LEAST_SECONDS:
            pytest.exit("the time is over; the same command goes on", returncode=0)
        folder.started(_case(item))
    result = yield
    if folder is not None:
        folder.ended()
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(item.stash.get(_LINE, f"{_case(item)}: failed"))
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # an illegal access, say: nothing else can run in this process
            pytest.exit(f"the device is lost to this process: {error}", returncode=runner.DEVICE_LOST)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    folder = item.config.bench_folder
    if folder is not None and report.when == "call" and report.failed:
        message = str(call.excinfo.value).strip().splitlines() or [""]
        folder.write_failure(_case(item), f"failed: {call.excinfo.typename}: {message[0]}")
    return report


@pytest.fixture(autouse=True)
def _compiled_afresh():
    """Dynamo remembers shapes by code object: without this, torch.compile would turn to dynamic shapes from the second case on."""
    torch.compiler.reset()


@pytest.fixture
def toy(request) -> bool:
    """Whether to run tiny shapes on the CPU."""
    return bool(request.config.getoption("--toy")) or not torch.cuda.is_available()


_environment = functools.cache(machine.environment)


@pytest.fixture(autouse=True)
def _same_numbers():
    """Weights and inputs are those of every other run of the case, and so are its errors."""
    torch.manual_seed(0)


@pytest.fixture
def compare(benchmark, request):
    """compare(candidates, inputs, cost=..., matrix=..., **shape): measures all candidates and records a row of each.

    The first candidate is fastdeit, the second the eager form that errors are put beside. `expected`, `different` and `agreement`
    are those of timing.measure; `errors` has what was found before, by candidate, for rows without any. `floors` gives from
    ceilings the least microseconds of fastdeit and of an ideal compiler around the same products, where the two differ; `images`
    is how many a call processes.
    """
    config = request.config
    case_end = time.monotonic() + config.getoption("--case-seconds")

    def run(
        candidates,
        inputs,
        *,
        cost,
        matrix,
        floors=None,
        expected=None,
        different=(),
        agreement=False,
        errors=None,
        images=None,
        turns=20,
        **shape,
    ):
        quick = config.getoption("--quick")
        if quick:
            candidates = baselines.soon_set_up(candidates)
        ceilings = roofline.measured_ceilings()
        floor = None if ceilings is None else ceilings.floor_us(cost, matrix=matrix)
        compile_floor = floor
        if ceilings is not None and floors is not None:
            floor, compile_floor = floors(ceilings)
        before = machine.clocks()
        result = []

        def measured():
            result[:] = timing.measure(
                candidates,
                inputs,
                expected=expected,
                different=different,
                agreement=agreement,
                turns=turns if ceilings else 3,
                candidate_seconds=config.getoption("--candidate-seconds"),
                deadline=min(case_end, config.bench_end),
            )

        benchmark.pedantic(measured, rounds=1)
        for row in result:
            if not row.max_errors and row.candidate in (errors or {}):
                row.max_errors, row.rms_errors = errors[row.candidate]
        rows = [row.derived(cost.flops, cost.bytes, floor) for row in result]
        for row in rows:
            row["images_per_s"] = images / row["median_us"] * 1e6 if images and row["median_us"] else None
        benchmark.extra_info |= {
            "suite": _suite(request.node),
            "quick": quick,
            "shape": shape,
            "flops": cost.flops,
            "bytes": cost.bytes,
            "floor_us": floor,
            "compile_floor_us": compile_floor,
            "ceilings": None if ceilings is None else vars(ceilings),
            "clocks": [before, machine.clocks()],
            "environment": _environment(),
            "rows": rows,
        }
        cut_off = config.bench_end < case_end and any(row.status.startswith("not measured") for row in result)
        if config.bench_folder is not None and not cut_off:
            config.bench_folder.write(_case(request.node), _document(config))
        request.node.stash[_LINE] = _summary(_case(request.node), rows) + ("; left for the next run" if cut_off else "")
        failed = result[0].status.startswith(("failed", "not installed"))
        assert not failed, f"{result[0].candidate}: {result[0].status}"
        return result

    return run


def _document(config) -> dict:
    """What pytest-benchmark would write of the latest case alone."""
    session = config._benchmarksession
    if not hasattr(config, "bench_machine"):
        config.bench_machine = (
            session.get_machine_info(),
            config.hook.pytest_benchmark_generate_commit_info(config=config),
        )
    ran_on, commit = config.bench_machine
    return config.hook.pytest_benchmark_generate_json(
        config=config, benchmarks=session.benchmarks[-1:], include_data=True, machine_info=ran_on, commit_info=commit
    )


def _summary(case: str, rows) -> str:
    ours, *others = rows
    if not ours["median_us"]:
        return f"{case}: {ours['status']}"
    text = f"{case}: {ours['median_us']:.1f} us"
    if ours["share_of_floor"]:
        text += f", {ours['share_of_floor']:.0%} of the floor"
    timed = [row for row in others if row["median_us"]]
    if timed:
        best = min(timed, key=lambda row: row["median_us"])
        text += f", {best['median_us'] / ours['median_us']:.2f}x as fast as {best['candidate']}"
    return text
