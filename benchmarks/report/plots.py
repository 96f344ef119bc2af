"""Pictures of results: how much faster fastdeit is in each case, and how close to the device's ceilings."""

from pathlib import Path

from fastdeit.benchmarks import results_folder

_COLORS = ("tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray", "tab:olive")


def draw(path: Path, folder: Path) -> list[Path]:
    """Writes speedup.png and roofline.png of a folder of results, and returns what was written.

    Raises:
        ValueError: it holds no results.
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"plots need the extra 'bench': pip install 'fastdeit[bench]' ({error})") from error
    matplotlib.use("Agg")
    identity, benchmarks, _ = results_folder.read(path)
    timed = [b for b in benchmarks if b["extra_info"]["rows"][0]["median_us"]]
    if not timed:
        return []
    title = identity.get("gpu") or "on a CPU, tiny shapes: no measurement"
    return [_speedups(timed, title, folder / "speedup.png"), _roofline(timed, title, folder / "roofline.png")]


def _speedups(benchmarks: list[results_folder.Benchmark], title: str, file: Path) -> Path:
    """A line a case, a point a candidate: its time over fastdeit's."""
    from matplotlib import pyplot

    suites: dict[str, list[results_folder.Benchmark]] = {}
    for benchmark in benchmarks:
        suites.setdefault(results_folder.suite_of(benchmark), []).append(benchmark)
    heights = [len(cases) + 2.5 for cases in suites.values()]
    figure, axes = pyplot.subplots(
        len(suites), 1, figsize=(9, 0.28 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (suite, cases) in zip(axes[:, 0], suites.items(), strict=True):
        points: dict[str, list[tuple[float, int]]] = {}
        for line, benchmark in enumerate(cases):
            ours, *others = benchmark["extra_info"]["rows"]
            for row in others:
                if row["median_us"]:
                    points.setdefault(row["candidate"], []).append((row["median_us"] / ours["median_us"], line))
        for color, (candidate, values) in zip(_COLORS * len(points), points.items(), strict=False):
            axis.plot(*zip(*values, strict=True), "o", markersize=4, color=color, label=candidate)
        axis.axvline(1, color="tab:blue", linewidth=1)
        axis.set_yticks(range(len(cases)), [b["name"].split("[")[-1].rstrip("]") for b in cases], fontsize=7)
        axis.set_ylim(len(cases) - 0.5, -0.5)
        axis.set_xscale("log")
        axis.set_title(f"{suite}: time over fastdeit's", fontsize=9, loc="left")
        axis.grid(axis="x", which="both", alpha=0.3)
        if points:
            axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    return file


def _roofline(benchmarks: list[results_folder.Benchmark], title: str, file: Path) -> Path:
    """Rate over operations per byte, fastdeit and the fastest other candidate of each case, under the device's ceilings."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    suites = list(dict.fromkeys(results_folder.suite_of(b) for b in benchmarks))
    for suite, color in zip(suites, ("tab:blue", *_COLORS) * len(suites), strict=False):
        infos = [
            b["extra_info"] for b in benchmarks if results_folder.suite_of(b) == suite and b["extra_info"]["bytes"]
        ]
        ours = [(i["flops"] / i["bytes"], i["rows"][0]["tflops"]) for i in infos]
        best = [(i["flops"] / i["bytes"], max(rates)) for i in infos if (rates := _rates(i["rows"][1:]))]
        if ours:
            axis.plot(*zip(*ours, strict=True), "o", markersize=5, color=color, label=f"{suite}, fastdeit")
        if best:
            axis.plot(*zip(*best, strict=True), "x", markersize=5, color=color, label=f"{suite}, fastest other")
    ceilings = next((b["extra_info"]["ceilings"] for b in benchmarks if b["extra_info"]["ceilings"]), None)
    if ceilings is not None:
        ridge = ceilings["tflops"] / ceilings["tb_per_s"]
        intensities = [0.25, ridge, max(2000.0, 2 * ridge)]
        axis.plot(intensities, [min(ceilings["tflops"], ceilings["tb_per_s"] * x) for x in intensities], color="black")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte that must move")
    axis.set_ylabel("TFLOP/s")
    axis.grid(which="both", alpha=0.3)
    axis.legend(fontsize=7)
    axis.set_title(title, fontsize=10)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    return file


def _rates(rows) -> list[float]:
    return [row["tflops"] for row in rows if row["median_us"]]
