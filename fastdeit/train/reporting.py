"""Results of a run for people: summary.csv, curves and the table of readouts."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdeit.train.files import write_atomically

READOUTS = {
    "class": "class head",
    "distillation": "distillation head",
    "softmax": "sum of softmaxes",
    "both": "both heads together",
    "top1": "top-1",
}


def write_summary(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One row per epoch, one column per quantity; empty where an epoch was not evaluated."""
    text = io.StringIO()
    longest: Mapping[str, Any] = max(history, key=len)  # an epoch without an evaluation has fewer
    names = list(longest)
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_curves(path: Path, history: Sequence[Mapping[str, Any]], teacher_top1: float | None) -> None:
    """Loss and top-1 over epochs as PNG."""
    from matplotlib.figure import Figure

    evaluated = [row for row in history if "val_loss" in row]
    epochs, evaluated_epochs = (
        [row["epoch"] + 1 for row in rows] for rows in (history, evaluated)
    )  # as lines count them
    style, evaluated_style = (
        "o" if len(rows) == 1 else "-" for rows in (history, evaluated)
    )  # one point makes no line
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in history], style, label="training, augmented")
    values = [row["val_loss"] for row in evaluated]
    loss.plot(evaluated_epochs, values, evaluated_style, label="validation, cross-entropy")
    loss.set(xlabel="epoch", ylabel="loss")
    for name, label in READOUTS.items():
        if evaluated and f"top1_{name}" in evaluated[0]:
            accuracy.plot(evaluated_epochs, [row[f"top1_{name}"] for row in evaluated], evaluated_style, label=label)
    if teacher_top1 is not None:
        accuracy.axhline(teacher_top1, color="grey", linestyle="--", label="teacher")
    accuracy.set(xlabel="epoch", ylabel="validation top-1 (%)")
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, lambda file: file.write(image.getvalue()))


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    found = {name: f"{row[f'top1_{name}']:.2f}" for name in READOUTS if f"top1_{name}" in row}
    top1 = found.get("top1") or "  ".join(f"{name} {value}" for name, value in found.items())
    line = f"epoch {row['epoch'] + 1:>3}/{epochs}  loss {row['train_loss']:.4f}  lr {row['lr']:.2e}"
    return f"{line}  top-1: {top1}" if found else line


def results_table(columns: Mapping[str, Mapping[str, float]], teacher: tuple[str, float] | None = None) -> str:
    """Validation top-1 in percent: a row per readout, a column per set of weights, the teacher above them.

    Args:
        columns: by title, what `evaluate` returned.
        teacher: its name and top-1.
    """
    width = max(8, *(len(title) for title in columns)) + 2
    lines = [f"{'validation top-1 (%)':<34}" + "".join(f"{title:>{width}}" for title in columns)]
    if teacher is not None:
        lines.append(f"{f'teacher ({teacher[0]})':<34}{teacher[1]:>{width}.2f}")
    for name, label in READOUTS.items():
        if all(name in column for column in columns.values()):
            lines.append(f"{label:<34}" + "".join(f"{column[name]:>{width}.2f}" for column in columns.values()))
    return "\n".join(lines)
