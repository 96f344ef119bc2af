"""A run from its configuration to its folder: the teacher if it is trained here, then the student."""

import contextlib
from pathlib import Path

import torch
from torch import nn

from fastdeit.train import analysis, report, workers
from fastdeit.train.cached_labels import CachedTeacher
from fastdeit.train.config import Config
from fastdeit.train.data_identity import identity
from fastdeit.train.datasets import Data, load_data
from fastdeit.train.decoders import with_decoder
from fastdeit.train.device import reproducible, select_device
from fastdeit.train.distributed import SINGLE, World
from fastdeit.train.evaluation import evaluate
from fastdeit.train.files import write_atomically
from fastdeit.train.fit import Fit, Result
from fastdeit.train.locks import claimed
from fastdeit.train.mistakes import confusion
from fastdeit.train.models import create_student, create_teacher, has_distillation_head, quickened
from fastdeit.train.phases import config_at
from fastdeit.train.report_page import write_page
from fastdeit.train.sampling import eval_loader
from fastdeit.train.signals import StopRequest
from fastdeit.train.tracking import Tracker, check_packages, create_trackers


def train(config: Config, folder: Path, resume: bool = False, world: World = SINGLE) -> Result:
    """Trains as config says and leaves args.yaml, summary.csv, curves.png, report.md, report.html and checkpoints in folder.

    Args:
        config: checked.
        folder: of this run; made if need be.
        resume: continue from folder's last.state.pt, and its teacher's, where there is one, at the step where it was written; the
            weights at the end are bit for bit those of an uninterrupted run, on as many processes.
        world: the processes that share the work, this one among them, already joined. One of them writes.

    Raises:
        ImportError: a package that config asks for is not installed.
        ValueError: data, model, teacher or checkpoints do not fit config, or another run is at work in folder. Raised before
            anything is trained or written.
        NonFiniteLossError: a loss or a gradient became NaN or infinite. The state before that step is in nonfinite.state.pt.
        Stopped: a signal asked for it. The state is saved.
        RunFailedError: anything else went wrong in training; the message says what is saved.
    """
    with contextlib.ExitStack() as ending:
        ending.enter_context(reproducible(config))
        stop = ending.enter_context(StopRequest().listening())
        ending.callback(workers.end_workers)
        check_packages(config)
        config = with_decoder(config)
        device = select_device(config, world)
        data = load_data(config)
        lock = world.on_main(lambda: ending.enter_context(claimed(folder)))
        known = world.on_main(lambda: {"train": identity(data.train), "val": identity(data.val)})
        common = dict(data=data, data_identity=known or {}, resume=resume, world=world, stop=stop, lock=lock)
        teacher, labels, teacher_fit = None, None, None
        if config.distillation_type != "none" and config.teacher_epochs:
            own = teacher_config(config)
            teacher = create_student(own, len(data.classes), device, field="teacher_model")
            teacher_fit = Fit("teacher", own, teacher, None, folder / "teacher", **common)
        elif config.teacher_cache is not None:
            labels = CachedTeacher(config, data, device, world.size)
        elif config.distillation_type != "none":
            teacher = quickened(create_teacher(config, len(data.classes), device, data.classes), device)
        first = config_at(config, 0)
        model = create_student(first, len(data.classes), device, initial_weights=True, classes=data.classes)
        student_fit = Fit("student", config, model, teacher or labels, folder, **common)

        trackers: list[Tracker] = []
        if world.main:
            _write_args(folder / "args.yaml", config)
            trackers = create_trackers(config, folder, len(student_fit.history))
        world.barrier()
        if teacher_fit is not None:
            teacher_fit.run()
            teacher.eval().requires_grad_(False)
        teacher_top1 = None
        if teacher is not None:
            with student_fit.ending_in_words():
                teacher_top1 = evaluate(
                    teacher, student_fit.results.loader(config), config, device, world, student_fit.stop_requested
                )["top1"]
        student_fit.run(teacher_top1, trackers)
        result = student_fit.result(teacher_top1)
        with student_fit.ending_in_words():
            if world.main:
                _report(student_fit, data, teacher, result, folder)
            world.barrier()
        return result


def _report(fit: Fit, data: Data, teacher: nn.Module | None, result: Result, folder: Path) -> None:
    """report.md, report.html and results.json, of the weights at the end of training."""
    config, model, device = fit.config, fit.trainer.model, fit.trainer.device
    validation = eval_loader(data.val, config.batch_size, config.workers, device.type == "cuda")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    columns = {"last epoch": result.last, **({"moving average": result.ema} if result.ema else {})}
    different = analysis.disagreement(model, teacher, validation, config, device)
    cosines = None
    if has_distillation_head(model):
        cosines = analysis.token_cosines(model, validation, config, device)
    graphs = fit.trainer.whole_step.outcome
    results = report.write_results(
        folder, config.as_dict(), name, columns, result.teacher_top1, different, cosines, graphs
    )
    counts, mistakes = confusion(model, validation, len(data.classes), config, device)
    write_page(folder, config, results, fit.history, data.classes, counts, mistakes)


def teacher_config(config: Config) -> Config:
    """The configuration by which config's teacher is trained: the same images and optimizer, no distillation."""
    return config.replace(
        name=f"{config.name}-teacher",
        model=config.teacher_model,
        model_kwargs=config.teacher_kwargs,
        epochs=config.teacher_epochs,
        warmup_epochs=min(config.warmup_epochs, config.teacher_epochs // 5),
        lr=config.teacher_lr,
        pretrained=False,
        finetune=None,
        finetune_new_head=False,
        drop=0.0,
        drop_path=0.0,
        drop_path_uniform=False,
        drop_path_mode="mask",
        mixup=0.0,
        cutmix=0.0,
        cutmix_minmax=None,
        mixup_off_epoch=0,
        bce_loss=False,
        bce_target_thresh=None,
        distil_class_token=False,
        model_ema_decay=0.0,
        distillation_type="none",
        teacher_model=None,
        teacher_kwargs={},
        teacher_epochs=0,
        img_size_schedule=None,
        aa_schedule=None,
    )


def _write_args(path: Path, config: Config) -> None:
    import yaml

    text = yaml.safe_dump(config.as_dict(), sort_keys=False)
    write_atomically(path, lambda file: file.write(text.encode()))
