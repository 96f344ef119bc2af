"""Raw results of `fastdeit bench --json` as Markdown: one table a suite, one row a candidate and case."""

import json
from pathlib import Path
from typing import Any

_HEADER = (
    "case",
    "candidate",
    "µs",
    "quartiles",
    "of fastdeit's time",
    "of the floor",
    "launches",
    "peak MiB",
    "how, or why not",
)


def markdown(path: Path) -> str:
    """The report of one results file.

    Raises:
        ValueError: the file is not what `fastdeit bench --json` writes.
    """
    try:
        benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        suites: dict[str, list[dict[str, Any]]] = {}
        for benchmark in benchmarks:
            suites.setdefault(benchmark["name"].split("[")[0].removeprefix("test_"), []).append(benchmark["extra_info"])
        parts = [f"# {path.name}"]
        if benchmarks:
            parts.append(_environment(benchmarks[0]["extra_info"]))
        parts += [_suite(name, cases) for name, cases in suites.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file that fastdeit bench --json wrote ({error!r})") from error
    return "\n\n".join(parts) + "\n"


def _environment(info: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in info["environment"].items() if value)
    ceilings = info["ceilings"]
    if ceilings is None:
        return f"{facts}. **On a CPU: these times show that the suites run, and nothing else.**"
    return f"{facts}. Ceilings measured on it: {ceilings['tflops']:.0f} TFLOP/s bf16, {ceilings['tb_per_s']:.2f} TB/s."


def _suite(name: str, cases: list[dict[str, Any]]) -> str:
    lines = [f"## {name}", "", _line(_HEADER), _line(["---"] * len(_HEADER))]
    for info in cases:
        case = ", ".join(f"{key} {value}" for key, value in info["shape"].items())
        ours = info["rows"][0]["median_us"]
        lines += [_line(_cells(case, row, ours)) for row in info["rows"]]
    return "\n".join(lines)


def _cells(case: str, row: dict[str, Any], ours: float | None) -> list[str]:
    if not row["median_us"]:
        return [case, row["candidate"], *[""] * 6, row["status"]]
    share = row.get("share_of_floor")
    return [
        case,
        row["candidate"],
        f"{row['median_us']:.1f}",
        f"{row['first_quartile_us']:.1f}-{row['third_quartile_us']:.1f}",
        f"{row['median_us'] / ours:.2f}x" if ours else "",
        f"{share:.0%}" if share else "",
        "" if row["launches"] is None else str(row["launches"]),
        "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}",
        row["timed_by"],
    ]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
