"""`fastdeit train`: trains by a configuration, by default on the digits."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from fastdeit.train.config import FIELDS, Config, load_config
from fastdeit.train.extras import check_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False  # an unknown field must not be taken for a longer one
    parser.add_argument("--config", metavar="NAME|FILE", help="shipped configuration or YAML file (default: digits)")
    parser.add_argument(
        "--resume", metavar="auto|FILE", help="continue: auto finds the run (or starts one), FILE is its last.state.pt"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print configuration, schedule and parameter groups; train nothing"
    )
    fields = parser.add_argument_group("fields of the configuration, each read as YAML")
    for name, field in FIELDS.items():
        option = "--" + name.replace("_", "-")
        spellings = [option] if "_" not in name else [option, f"--{name}"]
        help_text = field.metadata["help"].replace("%", "%%")
        fields.add_argument(*spellings, dest=f"field_{name}", metavar="VALUE", default=None, help=help_text)


def run(args: argparse.Namespace) -> int:
    check_extras()
    overrides = {name: value for name in FIELDS if (value := getattr(args, f"field_{name}")) is not None}
    folder = find_folder(args.resume, overrides.get("output"), lambda: load_config(args.config or "digits", overrides))
    saved = folder / "args.yaml" if args.resume and folder is not None else None
    source = args.config or (str(saved) if saved is not None and saved.is_file() else "digits")
    config = load_config(source, overrides)
    if args.dry_run:
        from fastdeit.train.dry_run import describe

        print(describe(config))
        return 0
    return _train(config, folder or new_folder(config), resume=bool(args.resume))


def _train(config: Config, folder: Path, resume: bool) -> int:
    from fastdeit.train.engine import NonFiniteLossError
    from fastdeit.train.reporting import results_table
    from fastdeit.train.run import train

    print(f"run folder: {folder}", flush=True)
    try:
        result = train(config, folder, resume)
    except NonFiniteLossError as error:
        print(f"fastdeit train: {error}; the last good checkpoint is in {folder}", file=sys.stderr)
        return 1
    columns = {"last epoch": result.last, **({"moving average": result.ema} if result.ema else {})}
    teacher = (config.teacher_model, result.teacher_top1) if result.teacher_top1 is not None else None
    print()
    print(results_table(columns, teacher))
    print(f"\nbest.safetensors: epoch {result.best_epoch + 1}, {result.best_top1:.2f}")
    print(f"fastdeit eval --checkpoint {folder / 'last.safetensors'} gives the last epoch's figures again")
    return 0


def find_folder(resume: str | None, output: str | None, config: Callable[[], Config]) -> Path | None:
    """The folder of the run to start or to continue; None for a new one under runs/.

    Raises:
        FileNotFoundError: resume names a file that is not there.
        ValueError: resume and output contradict each other, or output holds a run and is not to be resumed.
    """
    from fastdeit.train.checkpoints import STATE

    if resume is None:
        if output is not None and holds_run(Path(output)):
            raise ValueError(
                f"output: {output} holds a run already; continue it with --resume auto or choose another folder"
            )
        return Path(output) if output is not None else None
    if resume == "auto":
        return Path(output) if output is not None else latest_folder(config())
    state = Path(resume)
    if not state.is_file():
        raise FileNotFoundError(f"resume: {resume} is neither `auto` nor a file")
    if state.name != STATE:
        raise ValueError(f"resume: expected a run's {STATE}, got {resume}")
    if output is not None and Path(output).resolve() != state.parent.resolve():
        raise ValueError(f"output: a run is continued in its own folder, {state.parent}; got {output}")
    return state.parent


def holds_run(folder: Path) -> bool:
    return (folder / "args.yaml").exists()


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
