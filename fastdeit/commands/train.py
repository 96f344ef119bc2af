"""`fastdeit train`: trains by a configuration, by default on the digits."""

import argparse
import os
import sys
from pathlib import Path

from fastdeit.train.checkpoints import STATE
from fastdeit.train.config import FIELDS, Config, load_config
from fastdeit.train.extras import check_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", metavar="auto|FILE", help="continue: auto finds the run (or starts one), FILE is its last.state.pt"
    )
    instead = parser.add_mutually_exclusive_group()  # of training
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="print configuration, schedule, parameter groups, memory, GPU-hours and whether steps can be recorded as a CUDA "
        "graph; train nothing",
    )
    instead.add_argument(
        "--measure-data",
        action="store_true",
        help="time the loader alone and the training step alone, and say which is the bottleneck; keep nothing",
    )
    instead.add_argument(
        "--throughput",
        action="store_true",
        help="time the training step on synthetic images: the largest batch that fits, or --batch-size; mean of --runs",
    )
    parser.add_argument("--runs", type=int, metavar="N", help="timed runs of --throughput (default: 30)")
    add_config_arguments(parser)
    parser.usage = (
        "fastdeit train [-h] [--config NAME|FILE] [--resume auto|FILE]\n"
        "                      [--dry-run | --measure-data | --throughput [--runs N]] [--FIELD VALUE ...]"
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config`, and an option for every field."""
    parser.allow_abbrev = False  # an unknown field must not be taken for a longer one
    parser.add_argument("--config", metavar="NAME|FILE", help="shipped configuration or YAML file (default: digits)")
    fields = parser.add_argument_group("fields of the configuration, each read as YAML; by default what --config says")
    for name, field in FIELDS.items():
        option = "--" + name.replace("_", "-")
        help_text = field.metadata["help"].replace("%", "%%")
        bare = dict(nargs="?", const="true") if field.type in (bool, "bool") else {}  # --compile is --compile true
        same = dict(dest=f"field_{name}", metavar="VALUE", default=None, **bare)
        fields.add_argument(option, help=help_text, **same)
        if "_" in name:  # as in configuration files
            fields.add_argument(f"--{name}", help=argparse.SUPPRESS, **same)


def overrides_of(args: argparse.Namespace) -> dict[str, str]:
    """The fields given on the command line, as text."""
    return {name: value for name in FIELDS if (value := getattr(args, f"field_{name}")) is not None}


def run(args: argparse.Namespace) -> int:
    check_extras()
    overrides = overrides_of(args)
    source = args.config or "digits"
    folder = folder_to_resume(args.resume, source, overrides) if args.resume else None
    if folder is not None and not args.config and (folder / "args.yaml").is_file():
        source = str(folder / "args.yaml")  # a run is continued by its own configuration
    config = load_config(source, overrides)
    folder = folder or new_folder(config)
    if args.dry_run:
        from fastdeit.train.distributed import started_world
        from fastdeit.train.dry_run import describe

        world = started_world()
        text = describe(config, world)
        if world.main:
            print(text)
        return 0
    if args.measure_data:
        from fastdeit.train.measure import measure_data

        print(measure_data(config))
        return 0
    if args.throughput:
        from fastdeit.train.throughput import RUNS, training_throughput

        given = config.batch_size if "batch_size" in overrides else None
        print(training_throughput(config, given, RUNS if args.runs is None else args.runs))
        return 0
    if args.runs is not None:
        raise ValueError("--runs: is for --throughput")
    if holds_run(folder) and not args.resume:
        raise ValueError(
            f"output: {folder} holds a run already; continue it with --resume auto or choose another folder"
        )
    check_writable(folder)
    return _train(config, folder, resume=bool(args.resume))


def _train(config: Config, folder: Path, resume: bool) -> int:
    from fastdeit.train.device import select_device
    from fastdeit.train.distributed import joined, started_world
    from fastdeit.train.monitor import NonFiniteLossError
    from fastdeit.train.reporting import results_table
    from fastdeit.train.run import train
    from fastdeit.train.signals import Stopped

    world = started_world()
    with joined(world, select_device(config, world).type):
        folder = world.agreed(folder)
        if world.main:
            print(f"run folder: {folder}", flush=True)
        try:
            result = train(config, folder, resume, world)
        except NonFiniteLossError as error:
            print(f"fastdeit train: {error}; the last good checkpoint is in {folder}", file=sys.stderr)
            return 1
        except Stopped as stopped:
            if world.main:
                print(f"fastdeit train: {stopped}", file=sys.stderr)
            return stopped.exit_code
    if not world.main:
        return 0
    columns = {"last epoch": result.last, **({"moving average": result.ema} if result.ema else {})}
    teacher = (config.teacher_model, result.teacher_top1) if result.teacher_top1 is not None else None
    print()
    print(results_table(columns, teacher))
    print(f"\nbest.safetensors: epoch {result.best_epoch + 1}, {result.best_top1:.2f}")
    print(f"fastdeit eval --checkpoint {folder / 'last.safetensors'} gives the last epoch's figures again")
    return 0


def folder_to_resume(resume: str, source: str, overrides: dict[str, str]) -> Path | None:
    """The folder of the run to continue; None if resume is `auto` and there is none.

    Raises:
        FileNotFoundError: resume names a file that is not there.
        ValueError: it is not a run's state, or output is another folder.
    """
    output = overrides.get("output")
    if resume == "auto":
        return Path(output) if output is not None else latest_folder(load_config(source, overrides))
    state = Path(resume)
    if not state.is_file():
        raise FileNotFoundError(f"resume: {resume} is neither `auto` nor a file")
    if state.name != STATE:
        raise ValueError(f"resume: expected a run's {STATE}, got {resume}")
    if output is not None and Path(output).resolve() != state.parent.resolve():
        raise ValueError(f"output: a run is continued in its own folder, {state.parent}; got {output}")
    return state.parent


def check_writable(folder: Path) -> None:
    """Raises ValueError where folder cannot be made or written to, as far as that can be told without trying."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"output: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output: no permission to write into {there}")


def holds_run(folder: Path) -> bool:
    """Whether training in folder has come as far as a checkpoint, its own or its teacher's."""
    return (folder / STATE).exists() or (folder / "teacher" / STATE).exists()


def new_folder(config: Config) -> Path:
    """runs/NAME, or the first of runs/NAME-2, runs/NAME-3... that holds no run; the configuration's own if it names one."""
    if config.output:
        return Path(config.output)
    number = 1
    while holds_run(_numbered(config, number)):
        number += 1
    return _numbered(config, number)


def latest_folder(config: Config) -> Path | None:
    """The newest of the folders that `new_folder` made, if any."""
    if config.output:
        return Path(config.output)
    number = 1
    while holds_run(_numbered(config, number + 1)):
        number += 1
    folder = _numbered(config, number)
    return folder if holds_run(folder) else None


def _numbered(config: Config, number: int) -> Path:
    return Path("runs") / (config.name if number == 1 else f"{config.name}-{number}")
