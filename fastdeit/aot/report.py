"""Every configuration and what the compiler made of it, compiled here or read from resources.json.

There the figures are committed, each under a key of what was compiled: only what has changed since needs to be compiled.
"""

import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton

from fastdeit.aot import catalog, execution_table
from fastdeit.aot.catalog import ARCHITECTURES, KERNEL_FILES, Resources
from fastdeit.aot.execution import Execution
from fastdeit.aot.instruction_stream import InstructionStream
from fastdeit.kernels.runtime.aot_config import AotConfig

RESOURCES_FILE = Path(__file__).with_name("resources.json")
UPDATE_COMMAND = "fastdeit kernels --update"
PAGE = "compiled-rows.md"  # of docs/
REEXECUTE_COMMAND = f"{UPDATE_COMMAND} --execute"
_MOST_WORKERS = 16  # each takes a gigabyte or so
_POOL_FROM = 8  # fewer configurations compile sooner than worker processes start


@dataclass(frozen=True)
class Entry:
    """A configuration of the catalog on one architecture."""

    file: str
    index: int  # in the file's `aot_configs(arch)`, by which a worker process finds it
    arch: int
    row: AotConfig

    @property
    def name(self) -> tuple[str, str, str]:
        return self.row.kernel.__name__, self.row.label, f"sm_{self.arch}"

    def as_dict(self, resources: Resources) -> dict:
        kernel, label, arch = self.name
        config = f"{label}; {_count(self.row.num_warps, 'warp')}, {_count(self.row.num_stages, 'stage')}"
        key = {"key": catalog.row_key(self.row, self.arch)}
        return {"kernel": kernel, "config": config, "arch": arch, **asdict(resources), **key}


def entries(archs: Iterable[int] = ARCHITECTURES, files: Iterable[str] = KERNEL_FILES) -> list[Entry]:
    """Every configuration of the catalog, in the order of the committed file.

    Raises:
        ValueError: two configurations of one kernel on one architecture have the same label.
    """
    found = [
        Entry(file, index, arch, row)
        for arch in archs
        for file in files
        for index, row in enumerate(catalog.aot_configs(arch, (file,)))
    ]
    names = set()
    for entry in found:
        if entry.name in names:
            raise ValueError("two configurations are both called {} ({}) on {}".format(*entry.name))
        names.add(entry.name)
    return sorted(found, key=lambda entry: (entry.file, entry.row.kernel.__name__, entry.arch))


def compile_entries(chosen: list[Entry]) -> list[Resources | str]:
    """Each configuration's compiled figures, or the first line of the compiler's error."""
    if len(chosen) < _POOL_FROM:
        return [_progress(_compile(e.file, e.index, e.arch), e, i, len(chosen)) for i, e in enumerate(chosen, 1)]
    # Started anew rather than forked: PyTorch has threads.
    workers = min(os.cpu_count() or 1, _MOST_WORKERS)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_compile, e.file, e.index, e.arch) for e in chosen]
        return [_progress(j.result(), e, i, len(jobs)) for i, (j, e) in enumerate(zip(jobs, chosen, strict=True), 1)]


def read_committed() -> dict[str, Resources]:
    """The committed figures by key; none where they were made with another Triton version."""
    if not RESOURCES_FILE.exists():
        return {}
    committed = json.loads(RESOURCES_FILE.read_text(encoding="utf-8"))
    if committed["triton"] != triton.__version__:
        return {}
    return {row["key"]: _from_record(row) for row in committed["rows"]}


def _from_record(row: dict) -> Resources:
    facts = {name: row[name] for name in Resources.__dataclass_fields__ if name not in ("stream", "execution")}
    stream, execution = row.get("stream"), row.get("execution")
    return Resources(
        **facts,
        stream=None if stream is None else InstructionStream.from_dict(stream),
        execution=None if execution is None else Execution.from_dict(execution),
    )


def as_json(rows: list[dict]) -> str:
    """The committed form: one row a line."""
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    return f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "rows": [\n{lines}\n  ]\n}}\n'


def _compile(file: str, index: int, arch: int) -> Resources | str:
    row = list(catalog.aot_configs(arch, (file,)))[index]
    try:
        return catalog.compile_config(row, arch)
    except Exception as error:  # the compiler has no exception of its own; a report names what failed and goes on
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _progress(result, entry: Entry, done: int, total: int):
    print("[{}/{}] {} ({}) {}".format(done, total, *entry.name), file=sys.stderr, flush=True)
    return result


def update_committed(rows: dict[tuple[str, str, str], dict], covered: set[tuple[str, str, str]]) -> None:
    """Writes the rows to resources.json, and keeps what the file holds of other current configurations.

    In a clone of the repository the page of docs/ that shows them is written too.
    """
    everything, known = entries(), read_committed()
    kept = []
    for entry in everything:
        if entry.name in rows:
            kept.append(rows[entry.name])
        elif entry.name not in covered and (key := catalog.row_key(entry.row, entry.arch)) in known:
            kept.append(entry.as_dict(known[key]))
    RESOURCES_FILE.write_text(as_json(kept), encoding="utf-8")
    if (page := RESOURCES_FILE.parents[2] / "docs" / PAGE).exists():
        page.write_text(committed_page(), encoding="utf-8")


def committed_page() -> str:
    """docs/compiled-rows.md, made from resources.json."""
    committed = json.loads(RESOURCES_FILE.read_text(encoding="utf-8"))
    rows = [(row["kernel"], row["config"], row["arch"], _from_record(row)) for row in committed["rows"]]
    return execution_table.page(rows, committed["triton"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
