"""`fastdeit train`: trains by a configuration, by default on the digits."""

import argparse
import os
import sys
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdeit.train.checkpoints import PREVIOUS, STATE, has_state
from fastdeit.train.config import FIELDS, Config, load_config
from fastdeit.train.extras import check_extras
from fastdeit.train.locks import LOCK

if TYPE_CHECKING:
    from fastdeit.train.distributed import World


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
        help="time the loader alone and the training step alone, and print which is the bottleneck; save nothing",
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
        same: dict[str, Any] = dict(dest=f"field_{name}", metavar="VALUE", default=None, **bare)
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
    return _train(config, folder, resume=bool(args.resume))


def _train(config: Config, folder: Path, resume: bool) -> int:
    from fastdeit.train.device import select_device
    from fastdeit.train.distributed import joined, started_world
    from fastdeit.train.peers import leave

    world = started_world()
    with joined(world, select_device(config, world).type):
        code = _train_together(config, world.agreed(folder), resume, world)
        if world.size > 1:
            leave(code)
    return code


def _train_together(config: Config, folder: Path, resume: bool, world: "World") -> int:
    """Trains in the processes of world; one of them prints the result."""
    from fastdeit.train.failures import RunFailedError, known_cause
    from fastdeit.train.monitor import NonFiniteLossError
    from fastdeit.train.reporting import results_table
    from fastdeit.train.run import train
    from fastdeit.train.signals import Stopped

    def ended(message: object, code: int, known_to_all: bool = False) -> int:
        """Prints the message once: in the main process, or in another one if that cannot be reached."""
        reached = known_to_all or world.peers is None or (world.peers.tell(str(message)) and world.peers.main_knows)
        if world.main or not reached:
            rank = "" if world.main else f"rank {world.rank}: "
            print(f"fastdeit train: {rank}{message}", file=sys.stderr, flush=True)
        return code

    try:
        world.on_main(lambda: check_free(folder, resume))
        if world.main:
            print(f"run folder: {folder}", flush=True)
        result = train(config, folder, resume, world)
    except Stopped as stopped:
        return ended(stopped, stopped.exit_code, known_to_all=True)
    except NonFiniteLossError as error:
        return ended(error, 1, known_to_all=True)
    except RunFailedError as error:
        return ended(error, 1)
    except KeyboardInterrupt:
        return ended("interrupted", 130)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if world.peers is None:
            raise
        return ended(known_cause(world, error), 2)
    except Exception as error:
        return ended(known_cause(world, error), 1)
    if not world.main:
        return 0
    columns = {"last epoch": result.last, **({"moving average": result.ema} if result.ema else {})}
    teacher = (config.teacher_model, result.teacher_top1) if result.teacher_top1 is not None else None
    print()
    print(results_table(columns, teacher))
    print(f"\nbest.safetensors: epoch {result.best_epoch + 1}, {result.best_top1:.2f}")
    print(f"fastdeit eval --checkpoint {folder / 'last.safetensors'} gives the last epoch's figures again")
    return 0


def check_free(folder: Path, resume: bool) -> None:
    """Raises ValueError where folder cannot be written to, or holds a run that is not to be resumed."""
    if holds_run(folder) and not resume:
        raise ValueError(
            f"output: {folder} holds a run already; continue it with --resume auto or choose another folder"
        )
    check_writable(folder)


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
    return has_state(folder) or has_state(folder / "teacher")


def new_folder(config: Config) -> Path:
    """runs/NAME, or the first of runs/NAME-2, runs/NAME-3... that holds no run; the configuration's own if it names one.

    A folder in which a run is at work holds one as well.
    """
    if config.output:
        return Path(config.output)
    number = 1
    while holds_run(_numbered(config, number)) or (_numbered(config, number) / LOCK).exists():
        number += 1
    return _numbered(config, number)


def latest_folder(config: Config) -> Path | None:
    """Of the folders that `new_folder` made, the one whose state is newest, if any; the configuration's own if it names one.

    A folder in which a run has started and not saved yet counts as well.
    """
    if config.output:
        return Path(config.output)
    first = _numbered(config, 1)
    numbered = (path for path in first.parent.glob(f"{escape(first.name)}-*") if path.name.rpartition("-")[2].isdigit())
    found = [path for path in (first, *numbered) if holds_run(path) or (path / LOCK).exists()]
    return max(found, key=_written, default=None)


def _written(folder: Path) -> tuple[float, int]:
    """When the newest state in folder was written, if any, and the folder's number, for two of the same time."""
    states = [folder / sub / name for sub in (".", "teacher") for name in (STATE, PREVIOUS)]
    number = folder.name.rpartition("-")[2]
    found = [path for path in states if path.exists()] or [folder / LOCK]
    return max(path.stat().st_mtime for path in found), int(number) if number.isdigit() else 1


def _numbered(config: Config, number: int) -> Path:
    return Path("runs") / (config.name if number == 1 else f"{config.name}-{number}")
