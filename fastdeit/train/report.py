"""Reports of a finished run: results.json for programs, report.md for people."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from fastdeit.train.analysis import matrix
from fastdeit.train.config import FREE_FIELDS
from fastdeit.train.files import write_atomically
from fastdeit.train.reporting import READOUTS

RESULTS, REPORT = "results.json", "report.md"
_SEED_FIELDS = {*FREE_FIELDS, "seed", "name"}  # runs that differ in these alone are repetitions of each other
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header, rows
_PACKAGES = ("fastdeit", "torch", "triton", "timm", "numpy")

DEIT = """@inproceedings{touvron2021training,
  title     = {Training data-efficient image transformers \\& distillation through attention},
  author    = {Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and Massa, Francisco and Sablayrolles, Alexandre
               and J{\\'e}gou, Herv{\\'e}},
  booktitle = {International Conference on Machine Learning},
  pages     = {10347--10357},
  year      = {2021}
}"""
DEIT_3 = """@inproceedings{touvron2022deit,
  title     = {{DeiT III}: Revenge of the {ViT}},
  author    = {Touvron, Hugo and Cord, Matthieu and J{\\'e}gou, Herv{\\'e}},
  booktitle = {European Conference on Computer Vision},
  year      = {2022}
}"""
TIMM = """@misc{rw2019timm,
  author = {Ross Wightman},
  title  = {PyTorch Image Models},
  year   = {2019},
  doi    = {10.5281/zenodo.4414861},
  url    = {https://github.com/huggingface/pytorch-image-models}
}"""


def write_results(
    folder: Path,
    config: Mapping[str, Any],
    device: str,
    columns: Mapping[str, Mapping[str, float]],
    teacher_top1: float | None,
    disagreement: Mapping[tuple[str, str], float],
    cosines: Sequence[float] | None,
    cuda_graphs: str | None = None,
) -> dict[str, Any]:
    """Writes results.json and report.md into a run's folder; returns what results.json holds.

    Args:
        config: the run's, as plain values.
        device: what it ran on, in words.
        columns: by title (`last epoch`, `moving average`), what `engine.evaluate` returned.
        teacher_top1: in percent.
        disagreement, cosines: as `analysis` gives them; cosines of a model with two tokens alone.
        cuda_graphs: what became of them, in words, if they were asked for.
    """
    results = {
        "config": dict(config),
        "environment": {"device": device, "python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        "cuda_graphs": cuda_graphs,
        "top1": {title: dict(column) for title, column in columns.items()},
        "teacher_top1": teacher_top1,
        "disagreement": [[*pair, share] for pair, share in disagreement.items()],
        "token_cosines": list(cosines) if cosines is not None else None,
    }
    _write(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    _write(folder / REPORT, report(results, repetitions(folder, results)))
    return results


def repetitions(folder: Path, results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Results by folder name: this run's, and those of finished runs beside it that differ in the seed alone."""
    found = {folder.name: dict(results)}
    for file in sorted(folder.resolve().parent.glob(f"*/{RESULTS}")):
        if file.parent != folder.resolve():
            try:
                other = json.loads(file.read_text(encoding="utf-8"))
                same = _apart_from_seed(other["config"]) == _apart_from_seed(results["config"])
                seeds = {each["config"]["seed"] for each in found.values()}
                if same and other["config"]["seed"] not in seeds:
                    found[file.parent.name] = other
            except (ValueError, KeyError, TypeError):  # not ours, or of another version
                continue
    return found


class Section(NamedTuple):
    """A part of the report: a heading, a text and a table of cells, either of which may be missing."""

    title: str
    text: str = ""
    table: Table | None = None


def about(results: Mapping[str, Any]) -> list[str]:
    """What was trained, on what and with what, a sentence each."""
    config, environment = results["config"], results["environment"]
    found = [
        f"{config['model']} on {config['data']}, {config['img_size']} x {config['img_size']} pixels, {config['epochs']} epochs, "
        f"batches of {config['batch_size']}, seed {config['seed']}."
    ]
    if config["distillation_type"] != "none":
        found += [
            f"{config['distillation_type'].capitalize()} distillation from {config['teacher_model']}, "
            f"weight {config['distillation_alpha']:g}."
        ]
    if results.get("cuda_graphs"):
        found += [f"CUDA graphs: {results['cuda_graphs']}."]
    return [*found, "; ".join(f"{name} {value}" for name, value in environment.items()) + "."]


def sections(results: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """Figures of the report. runs are the repetitions with other seeds, this one among them."""
    found = [Section("Validation top-1 (%)", table=_accuracy(results))]
    if len(runs) > 1:
        found += [Section(f"Over {len(runs)} seeds", table=_over_seeds(runs))]
    if results["disagreement"]:
        text = "Percentage of validation images that two classifiers put into different classes (Table 4 of the DeiT paper)."
        found += [Section("Who disagrees with whom", text, _disagreement(results["disagreement"]))]
    if results["token_cosines"] is not None:
        text = (
            "Cosine between class and distillation token: the learned ones, then after each block, mean over the validation "
            "images. The DeiT paper (section 4) reports 0.06 at first and 0.93 at last for DeiT-B on ImageNet."
        )
        header = ["", "learned", *(f"block {i + 1}" for i in range(len(results["token_cosines"]) - 1))]
        row = ["cosine", *(f"{value:.3f}" for value in results["token_cosines"])]
        found += [Section("How alike the two tokens are", text, (header, [row]))]
    return found


def report(results: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of report.md."""
    config = results["config"]
    parts = [f"# {config['name']}", "\n".join(about(results)), "![Loss and top-1 over epochs](curves.png)"]
    for section in sections(results, runs):
        parts += [f"## {section.title}", *([section.text] if section.text else [])]
        parts += [_table(*section.table)] if section.table else []
    parts += ["## What to cite", "```bibtex\n" + "\n\n".join(citations(config)) + "\n```"]
    return "\n\n".join(parts) + "\n"


def citations(config: Mapping[str, Any]) -> list[str]:
    """BibTeX of the methods that a configuration uses."""
    return [DEIT, *([DEIT_3] if "deit3" in config["model"] else []), TIMM]


def _accuracy(results: Mapping[str, Any]) -> Table:
    columns = results["top1"]
    rows = [
        [label, *(f"{column[name]:.2f}" for column in columns.values())]
        for name, label in READOUTS.items()
        if all(name in column for column in columns.values())
    ]
    if results["teacher_top1"] is not None:
        teacher = f"teacher ({results['config']['teacher_model']})"
        rows.insert(0, [teacher, *[f"{results['teacher_top1']:.2f}"] * len(columns)])
    return ["", *columns], rows


def _over_seeds(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Mean and sample standard deviation; a readout that one of the runs lacks is left out."""
    runs_by_seed = sorted(runs.values(), key=lambda each: each["config"]["seed"])
    rows = []
    for title in runs_by_seed[0]["top1"]:
        for name, label in READOUTS.items():
            values = [each["top1"].get(title, {}).get(name) for each in runs_by_seed]
            if None not in values:
                spread = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
                rows.append([f"{label}, {title}", spread, *(f"{value:.2f}" for value in values)])
    seeds = [f"seed {each['config']['seed']}" for each in runs_by_seed]
    return ["", "mean ± deviation", *seeds], rows


def _disagreement(entries: Sequence[Sequence[Any]]) -> Table:
    names, rows = matrix({(a, b): share for a, b, share in entries})
    labels = [READOUTS.get(name, name) for name in names]
    rows_of_text = [[label, *(f"{100 * v:.1f}" for v in row)] for label, row in zip(labels, rows, strict=True)]
    return ["", *labels], rows_of_text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _apart_from_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _SEED_FIELDS}


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
