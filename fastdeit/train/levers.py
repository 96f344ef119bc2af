"""GPU-hours of a run with and without each way of doing less work, by the arithmetic of estimate.py. Nothing is measured."""

from typing import Any, NamedTuple

from torch import nn

from fastdeit.cost.models import parts, seconds
from fastdeit.train.config import Config
from fastdeit.train.estimate import (
    BYTES_PER_SECOND,
    FLOPS_PER_SECOND,
    execution_of,
    gpu_hours,
    plain_shape,
    teacher_gpu_hours,
)
from fastdeit.train.phases import config_at

EVALUATED = 256  # images of a batch, by which their time is estimated
FEWER_EVALUATIONS = 10  # epochs, the example for a run that evaluates after each


class Hours(NamedTuple):
    """GPU-hours of a run, estimated."""

    student: float
    teacher: float
    evaluation: float

    @property
    def total(self) -> float:
        return sum(self)


class Lever(NamedTuple):
    """Hours of the whole run without and with one way of doing less, all else as configured."""

    field: str
    value: Any  # of the field, with the lever
    on: bool  # whether the configuration has it
    without: float
    with_it: float


class Estimate:
    """Estimates of one run and of its variants.

    Args:
        config: of the run.
        model: its student.
        num_classes: of the data.
        updates: of the whole run.
        images: to evaluate on.

    Raises:
        ValueError: the costs of such a model are not known.
    """

    def __init__(self, config: Config, model: nn.Module, num_classes: int, updates: int, images: int) -> None:
        shape = plain_shape(model)
        if shape is None:
            raise ValueError(f"model: costs are known for plain vision transformers, not for a {type(model).__name__}")
        self.config = config
        self.model = model
        self.shape = shape
        self.updates = updates
        self.images = images
        self.teacher = 0.0
        if config.distillation_type != "none":
            self.teacher = teacher_gpu_hours(config, num_classes, updates)

    def hours(self, config: Config) -> Hours:
        """GPU-hours of a variant of the run."""
        student = gpu_hours(config, self.model, self.updates)
        assert student is not None
        teacher = self.teacher if config.distillation_type != "none" and config.teacher_cache is None else 0.0
        return Hours(student, teacher, self._evaluation(config))

    def _evaluation(self, config: Config) -> float:
        found = 0.0
        for epoch in range(config.epochs):
            last = epoch == config.epochs - 1
            if not last and (epoch + 1) % config.eval_every:
                continue
            models = 2 if config.model_ema_decay and (last or config.eval_ema == "each") else 1
            found += models * self._pass(config_at(config, epoch).img_size)
        return found

    def _pass(self, size: int) -> float:
        """Hours of one pass over the validation images of a size."""
        execution = execution_of(self.config)
        work = parts(self.shape.at(size), EVALUATED, execution, "amp", training=False)
        return self.images / EVALUATED * seconds(work, FLOPS_PER_SECOND, BYTES_PER_SECOND) / 3600

    def levers(self) -> list[Lever]:
        """The levers that apply to the run."""
        c = self.config
        # Field, its values without and with the lever, and whether it is on.
        candidates: list[tuple[str, Any, Any, bool]] = []
        schedule = c.img_size_schedule or self._example_schedule()
        if schedule is not None:
            candidates.append(("img_size_schedule", None, schedule, c.img_size_schedule is not None))
        if c.distillation_type == "hard" and not c.teacher_epochs:
            candidates.append(("teacher_cache", None, c.teacher_cache or "FILE", c.teacher_cache is not None))
        if c.drop_path and c.accelerate:
            candidates.append(("drop_path_mode", "mask", "skip", c.drop_path_mode == "skip"))
        fewer = c.eval_every if c.eval_every > 1 else FEWER_EVALUATIONS
        if c.epochs > fewer:
            candidates.append(("eval_every", 1, fewer, c.eval_every > 1))
        if c.model_ema_decay:
            candidates.append(("eval_ema", "each", "last", c.eval_ema == "last"))
        return [
            Lever(
                name,
                value,
                on,
                self.hours(c.replace(**{name: off})).total,
                self.hours(c.replace(**{name: value})).total,
            )
            for name, off, value, on in candidates
        ]

    def _example_schedule(self) -> list[list[int]] | None:
        """Three fifths of the epochs at 5/7 of the side and a fifth at 6/7, as EfficientTrain has it; None of few epochs or
        patches."""
        c, patch = self.config, self.shape.patch_size
        sizes = [c.img_size * sevenths // 7 // patch * patch for sevenths in (5, 6)]
        starts = [0, c.epochs * 3 // 5, c.epochs * 4 // 5]
        if not 0 < sizes[0] < sizes[1] < c.img_size or len(set(starts)) < 3:
            return None
        return [list(entry) for entry in zip(starts, [*sizes, c.img_size], strict=True)]


def describe_levers(config: Config, model: nn.Module, num_classes: int, updates: int, images: int) -> list[str]:
    """Lines of text; none for a model whose costs are not known.

    Args:
        config, model, num_classes, updates, images: as `Estimate` has them.
    """
    if plain_shape(model) is None:
        return []
    estimate = Estimate(config, model, num_classes, updates, images)
    hours = estimate.hours(config)
    lines = [
        f"GPU-hours, estimated by the same arithmetic: student {hours.student:.3g}, teacher {hours.teacher:.3g}, evaluation "
        f"{hours.evaluation:.3g}, {hours.total:.3g} in all",
        f"  {'without':>9}{'with':>9}  all else as configured",
    ]
    for lever in estimate.levers():
        state = "" if lever.on else " (off)"
        lines.append(f"  {lever.without:>9.3g}{lever.with_it:>9.3g}  {lever.field}: {lever.value}{state}")
    return lines
