"""What changed from one set of results to another, and what of it is beyond noise.

Two runs differ by clocks, temperature and neighbours too. In each case the candidates that are not fastdeit tell by how much: the
geometric mean of their changes is the machine's. A candidate is faster or slower if its quartiles lie apart both as measured and
with the machine's change taken out.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdeit.benchmarks import results_folder

FASTDEIT = "fastdeit"


@dataclass(frozen=True)
class Change:
    """One candidate in one case, before and after. `ratio` and `machine` are time after over time before."""

    suite: str
    case: str
    candidate: str
    before_us: float
    after_us: float
    machine: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.after_us / self.before_us


def changes(before: list[results_folder.Benchmark], after: list[results_folder.Benchmark]) -> list[Change]:
    """Every candidate that both have a time of, in the order of `before`."""
    later = {_key(benchmark): benchmark["extra_info"] for benchmark in after}
    found = []
    for benchmark in before:
        info = later.get(_key(benchmark))
        if info is None:
            continue
        new = {row["candidate"]: row for row in info["rows"] if row["median_us"]}
        pairs = [(row, new[row["candidate"]]) for row in benchmark["extra_info"]["rows"] if row["candidate"] in new]
        pairs = [(a, b) for a, b in pairs if a["median_us"]]
        others = [
            math.log(b["median_us"] / a["median_us"]) for a, b in pairs if not a["candidate"].startswith(FASTDEIT)
        ]
        machine = math.exp(sum(others) / len(others)) if others else 1.0
        suite, case = results_folder.suite_of(benchmark), _case(benchmark["extra_info"])
        found += [
            Change(suite, case, a["candidate"], a["median_us"], b["median_us"], machine, _verdict(a, b, machine))
            for a, b in pairs
        ]
    return found


def markdown(before: Path, after: Path) -> str:
    """The changes as a table.

    Raises:
        ValueError: one of the paths holds no results.
    """
    (old, earlier, _), (new, later, _) = results_folder.read(before), results_folder.read(after)
    lines = [f"# {after.name} against {before.name}", ""]
    facts = [f"{k} {old.get(k)} then, {new.get(k)} now" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    lines += [("Different: " + "; ".join(facts) if facts else "Same machine, versions and source") + ".", ""]
    found = changes(earlier, later)
    if not found:
        return "\n".join([*lines, "They have no case in common."]) + "\n"
    beyond = [c for c in found if c.verdict in ("faster", "slower")]
    lines += [f"{len(beyond)} of {len(found)} rows changed beyond noise.", ""]
    lines += ["| case | candidate | before, µs | after, µs | change | the machine's | verdict |", "|" + "---|" * 7]
    for c in found:
        verdict = f"**{c.verdict}**" if c in beyond else c.verdict
        cells = [f"{c.suite}: {c.case}", c.candidate, f"{c.before_us:.1f}", f"{c.after_us:.1f}"]
        cells += [f"{c.ratio - 1:+.1%}", f"{c.machine - 1:+.1%}", verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _verdict(a: dict[str, Any], b: dict[str, Any], machine: float) -> str:
    directions = {_direction(a, b, factor) for factor in (1.0, machine)}
    if len(directions) == 1:
        return directions.pop()
    return "as the machine" if _direction(a, b, machine) == "within noise" else "within noise"


def _direction(a: dict[str, Any], b: dict[str, Any], machine: float) -> str:
    if b["third_quartile_us"] / machine < a["first_quartile_us"]:
        return "faster"
    if b["first_quartile_us"] / machine > a["third_quartile_us"]:
        return "slower"
    return "within noise"


def _case(info: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in info["shape"].items())


def _key(benchmark: results_folder.Benchmark) -> tuple[str, str]:
    return results_folder.suite_of(benchmark), _case(benchmark["extra_info"])
