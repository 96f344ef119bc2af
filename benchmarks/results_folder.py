"""A folder of results: what they were measured with, which cases there are, and a file of pytest-benchmark's for each that is done.

A run that is stopped, by its time limit or by anything else, leaves whole files; the next one on the same machine and the same
source goes on with the cases that are missing.
"""

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import fastdeit
import fastdeit.kernels
from fastdeit.benchmarks import machine, timing

Benchmark = dict[str, Any]  # an entry of pytest-benchmark's JSON; what it says of a case is in its "extra_info"


def source_hash() -> str:
    """One digest of all Python files of the package, wherever it is installed."""
    roots = {Path(): Path(fastdeit.__file__).parent}
    roots |= {Path(name): Path(getattr(fastdeit, name).__path__[0]) for name in ("kernels", "benchmarks")}
    files = {(name / path.relative_to(d)).as_posix(): path for name, d in roots.items() for path in d.rglob("*.py")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def identity(toy: bool) -> dict[str, Any]:
    """What all results of a folder have in common: machine, versions, source."""
    return machine.environment() | {"source": source_hash(), "toy": toy}


def digest(identity: dict[str, Any]) -> str:
    """A short name for results that compare with one another."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def file_name(case: str) -> str:
    return re.sub(r"[^\w.-]+", "_", case) + ".json"


class Folder:
    """A folder of results at work."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def begin(self, identity: dict[str, Any]) -> None:
        """Makes the folder, or goes on with it.

        Raises:
            ValueError: it holds results of another machine, other versions or another source.
        """
        (self.directory / "cases").mkdir(parents=True, exist_ok=True)
        self.ended()
        known = _run(self.directory)
        if known is None:
            _write(self.directory / "run.json", dict(identity=identity, cases=[]))
            return
        before = known["identity"]
        changed = [k for k in sorted({*before, *identity}) if before.get(k) != identity.get(k)]
        if changed:
            facts = "; ".join(f"{k} {before.get(k)}, now {identity.get(k)}" for k in changed)
            raise ValueError(f"{self.directory} holds results that would not compare: {facts}. Give another folder")

    def plan(self, cases: list[str]) -> None:
        """Adds to the cases that the folder is to hold, most important first."""
        known = _run(self.directory)
        known["cases"] = list(dict.fromkeys([*known["cases"], *cases]))
        _write(self.directory / "run.json", known)

    def is_done(self, case: str, quick: bool = True) -> bool:
        """Whether it has a result; a quick run's is good for a quick run only."""
        file = self.directory / "cases" / file_name(case)
        if quick or not file.exists():
            return file.exists()
        return not any(b["extra_info"].get("quick") for b in json.loads(file.read_text(encoding="utf-8"))["benchmarks"])

    def started(self, case: str) -> None:
        _write(self.directory / "started.json", dict(case=case, at=time.time()))

    def ended(self) -> None:
        (self.directory / "started.json").unlink(missing_ok=True)

    def at_work(self) -> tuple[str, float] | None:
        """The case that a process has begun and not ended, and since how many seconds."""
        try:
            started = json.loads((self.directory / "started.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return started["case"], time.time() - started["at"]

    def write(self, case: str, document: dict[str, Any]) -> None:
        """Keeps a case's result, as pytest-benchmark's JSON."""
        _write(self.directory / "cases" / file_name(case), document)

    def write_failure(self, case: str, status: str) -> None:
        """Keeps that a case has no figures, and why. Deleting its file has it tried again."""
        suite, _, name = case.partition("-")
        row = timing.Row("fastdeit", status=status).derived(0, 0, None)
        info = dict(shape=dict(case=name), rows=[row], ceilings=None, floor_us=None)
        self.write(case, dict(benchmarks=[dict(name=f"test_{suite}[{name}]", extra_info=info)]))


def read(path: Path) -> tuple[dict[str, Any], list[Benchmark], list[str]]:
    """What all results have in common, the results in the order of importance, and the cases that are not measured yet.

    Args:
        path: a folder of results, or one file of them as `pytest --benchmark-json` writes it.

    Raises:
        ValueError: it is neither.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such folder or file; expected results that fastdeit bench wrote")
    try:
        if path.is_file():
            benchmarks = _checked(json.loads(path.read_text(encoding="utf-8")))
            return (benchmarks[0]["extra_info"].get("environment", {}) if benchmarks else {}), benchmarks, []
        known = _run(path)
        benchmarks, missing = [], []
        for case in known["cases"]:
            file = path / "cases" / file_name(case)
            if file.exists():
                benchmarks += _checked(json.loads(file.read_text(encoding="utf-8")))
            else:
                missing.append(case)
        return known["identity"], benchmarks, missing
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: expected results that fastdeit bench wrote ({error!r})") from error


def _checked(document: Any) -> list[Benchmark]:
    for benchmark in document["benchmarks"]:
        info = benchmark["extra_info"]
        if not (
            isinstance(benchmark["name"], str) and isinstance(info["shape"], dict) and info["rows"][0]["candidate"]
        ):
            raise ValueError(f"{benchmark['name']} is no case of a suite")
    return document["benchmarks"]


def suite_of(benchmark: Benchmark) -> str:
    return benchmark["name"].split("[")[0].removeprefix("test_")


def _run(directory: Path) -> Any:
    file = directory / "run.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
