"""What a training step takes beyond its parts, from the cases of the suite `training`: sentences for the report."""

from collections.abc import Sequence
from typing import Any

CAPTURED = "fastdeit, cuda_graphs"  # a row of the part `loop`
WITH_TEACHER, OUTSIDE = 1.03, 0.04  # what is aimed at, at most


def sentences(cases: Sequence[dict[str, Any]]) -> list[str]:
    """For each batch of which the parts were measured: the step with its teacher beside both alone, and what a run's whole step
    spends outside the model."""
    found = []
    for batch in sorted({info["shape"]["batch"] for info in cases}, reverse=True):
        times = {info["shape"]["part"]: _times(info) for info in cases if info["shape"]["batch"] == batch}
        ours = {part: rows["fastdeit"] for part, rows in times.items() if "fastdeit" in rows}
        if {"distilled", "teacher", "step"} <= ours.keys():
            ratio = ours["distilled"] / (ours["teacher"] + ours["step"])
            found.append(
                f"Batch {batch}: the step with its teacher takes {ratio:.3f} of the teacher's and the student's time alone "
                f"(aimed at: at most {WITH_TEACHER})."
            )
        if {"loop", "student"} <= ours.keys():
            found += [
                f"Batch {batch}, {name}: {_outside(times['loop'][row], ours)}"
                for name, row in (("kernel by kernel", "fastdeit"), ("as a graph", CAPTURED))
                if row in times["loop"]
            ]
    return found


def _times(info: dict[str, Any]) -> dict[str, float]:
    return {row["candidate"]: row["median_us"] for row in info["rows"] if row["median_us"]}


def _outside(loop: float, ours: dict[str, float]) -> str:
    """The share of a run's step that is not the student's forward, loss and backward, and what it is spent on."""
    besides = {name: ours[part] for part, name in _NAMES.items() if part in ours}
    rest = loop - ours["student"] - sum(besides.values())
    spent = ", ".join(f"{name} {time / loop:.1%}" for name, time in {**besides, "the host and the rest": rest}.items())
    share = (loop - ours["student"]) / loop
    return (
        f"{share:.1%} of a run's step is spent outside forward and backward (aimed at: at most {OUTSIDE:.0%}): {spent}."
    )


_NAMES = dict(optimizer="optimizer", ema="moving average", augmentation="augmentation")
