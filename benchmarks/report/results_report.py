"""`fastdeit bench report DIR...`: results as Markdown, one table a suite, one row a candidate and case."""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastdeit.benchmarks import comparison, results_folder
from fastdeit.benchmarks.report import training_step_parts

_HEADER = (
    "case",
    "candidate",
    "µs",
    "quartiles",
    "fastdeit's speed-up",
    "of the floor",
    "TFLOP/s",
    "GB/s",
    "images/s",
    "peak MiB",
    "launches",
    "plain call, µs",
    "largest error, of eager's",
    "RMS error, of eager's",
    "same class, logit error",
    "how, or why not",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path, metavar="DIR", help="of fastdeit bench; or a JSON file")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="where PNGs go; default: into each folder of results")


def run(args: argparse.Namespace) -> int:
    """Prints the tables and, from one to the next of several, what changed; writes the plots.

    Raises:
        ValueError: a path holds no results.
        ImportError: the extra `bench` is not installed.
    """
    parts = [markdown(path) for path in args.results]
    parts += [comparison.markdown(before, after) for before, after in pairwise(args.results)]
    print("\n".join(parts), end="")
    from fastdeit.benchmarks.report import plots

    for path in args.results:
        folder = args.plots or (path if path.is_dir() else path.parent)
        folder.mkdir(parents=True, exist_ok=True)
        plots.draw(path, folder)
    return 0


def markdown(path: Path) -> str:
    """The tables of one folder of results.

    Raises:
        ValueError: it holds none.
    """
    identity, benchmarks, missing = results_folder.read(path)
    suites: dict[str, list[results_folder.Benchmark]] = {}
    for benchmark in benchmarks:
        suites.setdefault(results_folder.suite_of(benchmark), []).append(benchmark["extra_info"])
    parts = [f"# {path.name}", environment(identity, benchmarks)]
    parts += [_suite(name, cases) for name, cases in suites.items()]
    if missing:
        parts.append("## Not measured, the time was over\n\n" + "\n".join(f"- {case}" for case in missing))
    return "\n\n".join(parts) + "\n"


def environment(identity: dict[str, Any], benchmarks: list[results_folder.Benchmark]) -> str:
    """What was measured with, in a sentence or two."""
    facts = ", ".join(f"{name} {value}" for name, value in identity.items() if value)
    ceilings = next((b["extra_info"]["ceilings"] for b in benchmarks if b["extra_info"]["ceilings"]), None)
    if ceilings is None:
        return f"{facts}. **On a CPU: these times show that the suites run, and nothing else.**"
    return f"{facts}. Ceilings measured on it: {ceilings['tflops']:.0f} TFLOP/s bf16, {ceilings['tb_per_s']:.2f} TB/s."


def case_name(info: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in info["shape"].items())


def _suite(name: str, cases: list[dict[str, Any]]) -> str:
    lines = [f"## {name}", "", _line(_HEADER), _line(["---"] * len(_HEADER))]
    for info in cases:
        for row in info["rows"]:
            lines.append(_line(_cells(case_name(info), row, info["rows"])))
        lines += _floors(info)
    if name == "training" and cases[0]["ceilings"] is not None:
        lines += ["", *(f"- {sentence}" for sentence in training_step_parts.sentences(cases))]
    return "\n".join(lines + _kernels(cases))


def _cells(case: str, row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    if not row["median_us"]:
        return [case, row["candidate"], *[""] * (len(_HEADER) - 3), row["status"]]
    ours = rows[0]["median_us"]
    share, images = row.get("share_of_floor"), row.get("images_per_s")
    return [
        case,
        row["candidate"],
        f"{row['median_us']:.1f}",
        f"{row['first_quartile_us']:.1f}-{row['third_quartile_us']:.1f}",
        f"{row['median_us'] / ours:.2f}x" if ours else "",
        f"{share:.0%}" if share else "",
        f"{row['tflops']:.1f}",
        f"{row['gb_per_s']:.0f}",
        f"{images:.0f}" if images else "",
        "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}",
        "" if row["launches"] is None else str(row["launches"]),
        "" if row["plain_call_us"] is None else f"{row['plain_call_us']:.1f}",
        _error(row["max_errors"], rows[1]["max_errors"] if len(rows) > 1 else []),
        _error(row["rms_errors"], rows[1]["rms_errors"] if len(rows) > 1 else []),
        _agreement(row),
        row["timed_by"],
    ]


def _agreement(row: dict[str, Any]) -> str:
    """Of logits, which older results do not have."""
    return "" if row.get("agreement") is None else f"{row['agreement']:.0%}, {row['logit_error']:.2%}"


def _error(errors: list[float], eager: list[float]) -> str:
    """The first result's error, and the largest ratio to eager's over all results."""
    if not errors:
        return ""
    ratios = [mine / theirs for mine, theirs in zip(errors, eager, strict=False) if theirs]
    return f"{errors[0]:.1e}" + (f", {max(ratios):.2f}x" if ratios else "")


def _floors(info: dict[str, Any]) -> list[str]:
    """What the device allows: the case's ceiling, and that of a perfect compiler around the same products."""
    floors = {"the floor": info.get("floor_us"), "an ideal torch.compile": info.get("compile_floor_us")}
    ours = info["rows"][0]["median_us"]
    return [
        _line(
            [
                case_name(info),
                name,
                f"{floor:.1f}",
                "",
                f"{floor / ours:.2f}x" if ours else "",
                *[""] * (len(_HEADER) - 6),
                "computed",
            ]
        )
        for name, floor in floors.items()
        if floor
    ]


def _kernels(cases: list[dict[str, Any]]) -> list[str]:
    """Which kernels ran for each candidate, from the first case that a profile was taken of."""
    seen: dict[str, list[str]] = {}
    for info in cases:
        for row in info["rows"]:
            if row["kernels"]:
                seen.setdefault(row["candidate"], list(dict.fromkeys(name[:100] for name in row["kernels"])))
    if not seen:
        return []
    return [
        "",
        "Kernels that ran:",
        "",
        *(f"- {who}: {', '.join(f'`{n}`' for n in names)}" for who, names in seen.items()),
    ]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
