"""report.html: the content of report.md, with pictures, in one self-contained file."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdeit.train.config import Config
from fastdeit.train.files import write_atomically
from fastdeit.train.mistakes import Mistake, thumbnail
from fastdeit.train.report import about, repetitions, sections
from fastdeit.web_page import heading, page, paragraph, picture, table, tiles

PAGE = "report.html"
_NAMED_CLASSES = 30  # up to which a matrix has the classes' names at its axes
# Column of the history to what its curve shows.
_RATES = {"images_per_second": "training images per second", "data_wait": "share of the time spent waiting for data"}


def write_page(
    folder: Path,
    config: Config,
    results: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    counts: Tensor,
    mistakes: Sequence[Mistake],
) -> None:
    """Writes report.html into a run's folder.

    Args:
        config: the run's, for how images were normalised.
        results: as `report.write_results` returned them.
        history: a row per epoch.
        classes: their names.
        counts: (classes, classes), true by predicted, as `mistakes.confusion` gives them.
        mistakes: the surest first.
    """
    parts = [paragraph(sentence) for sentence in about(results)]
    curves = folder / "curves.png"
    if curves.exists():
        parts += [picture(curves.read_bytes(), "loss and top-1 over epochs")]
    for section in sections(results, repetitions(folder, results)):
        parts += [heading(section.title), *([paragraph(section.text)] if section.text else [])]
        parts += [table(*section.table)] if section.table else []
    judged = "Of both heads together. " if any("both" in column for column in results["top1"].values()) else ""
    parts += [heading("Confusion matrix"), paragraph(f"{judged}Each row has the shares of one true class.")]
    parts += [picture(_matrix(counts, classes), "true class by predicted class")]
    wrong = int(counts.sum() - counts.diagonal().sum())
    text = f"{wrong:,} of {int(counts.sum()):,} validation images are in a wrong class; those of which the model is surest:"
    parts += [heading("The most confident mistakes"), paragraph(text)]
    parts += [
        tiles(
            [
                (
                    thumbnail(m.image, config),
                    f"{classes[m.truth]}, taken for {classes[m.predicted]} ({m.confidence:.0%})",
                )
                for m in mistakes
            ]
        )
    ]
    rates = {name: [row.get(name) for row in history] for name in _RATES}
    if any(value is not None for values in rates.values() for value in values):
        parts += [heading("Speed"), picture(_speed(rates), "images per second and data wait over epochs")]
    text = page(results["config"]["name"], parts)
    write_atomically(folder / PAGE, lambda file: file.write(text.encode()))


def _matrix(counts: Tensor, classes: Sequence[str]) -> bytes:
    """Each row as shares of its true class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    figure.colorbar(axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1), label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= _NAMED_CLASSES:
        long = any(len(name) > 3 for name in classes)
        axes.set_xticks(range(len(classes)), classes, rotation=90 if long else 0)
        axes.set_yticks(range(len(classes)), classes)
    return _png(figure)


def _speed(rates: Mapping[str, Sequence[float | None]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, 2), rates.items(), strict=True):
        known = [(epoch, value) for epoch, value in enumerate(values, start=1) if value is not None]
        axes.plot([epoch for epoch, _ in known], [value for _, value in known], "o-" if len(known) < 20 else "-")
        axes.set(xlabel="epoch", ylabel=_RATES[name])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    return _png(figure)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
