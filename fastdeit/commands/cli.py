"""`fastdeit COMMAND ...`: a table of commands, each a module with `add_arguments(parser)` and `run(args) -> exit code`."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import fastdeit
from fastdeit.train.transform_errors import TransformError


class Command(NamedTuple):
    module: str  # imported when the command is used, so that `--help` needs neither Triton nor scikit-learn
    help: str


COMMANDS = {
    "train": Command(
        "fastdeit.commands.train", "train a DeiT, by default on handwritten digits with a convnet teacher"
    ),
    "eval": Command("fastdeit.commands.eval", "print the accuracy of a checkpoint, of each head and of both together"),
    "predict": Command("fastdeit.commands.predict", "print the most likely classes of images"),
    "export": Command("fastdeit.commands.export", "write a model, frozen for inference, as a file that serves"),
    "cache-teacher": Command(
        "fastdeit.commands.cache_teacher", "run the teacher once and save its labels for later training runs"
    ),
    "shrink-data": Command(
        "fastdeit.commands.shrink_data", "write smaller JPEG copies of a folder of images, which decode faster"
    ),
    "explain": Command("fastdeit.commands.explain", "list what of a model runs fused, and why the rest does not"),
    "verify": Command(
        "fastdeit.commands.verify",
        "compare every layer with its library's and with float64; measure speed and memory",
    ),
    "run": Command("fastdeit.commands.run", "run a script unedited, with its models accelerated"),
    "kernels": Command(
        "fastdeit.commands.kernels", "compile every kernel and report registers, spills and instructions, without a GPU"
    ),
    "bench": Command("fastdeit.commands.bench", "time fused ops and models against PyTorch and other baselines"),
    "tune": Command("fastdeit.commands.tune", "find the fastest configuration of each kernel on this GPU"),
    "env": Command("fastdeit.commands.env", "print versions, GPU and driver for a bug report"),
    "launch-cost": Command(
        "fastdeit.commands.launch_cost", "measure host time per kernel launch and per model against timm, without a GPU"
    ),
}


def _did_you_mean(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """The options of parser that are nearest to those unknown, if any are near."""
    options = [option for action in parser._actions for option in action.option_strings]
    near = [m for u in unknown if u.startswith("-") for m in difflib.get_close_matches(u.split("=")[0], options, n=1)]
    return f"; did you mean {', '.join(near)}?" if near else ""


def _empty_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The options of parser that were given as an empty text."""
    return [
        action.option_strings[0] if action.option_strings else str(action.metavar)
        for action in parser._actions
        if isinstance(value := getattr(args, action.dest, None), str) and not value.strip()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Expected errors are printed without a traceback and give 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="fastdeit", description=fastdeit.__doc__)
    parser.add_argument("--version", action="version", version=f"fastdeit {fastdeit.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    handed_on: list[str] | None = None  # to another program, as they are
    chosen = next((a for a in argv if not a.startswith("-")), None)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        if name == chosen:
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
            if hasattr(module, "split_arguments"):
                argv, handed_on = module.split_arguments(argv)
            subparser.set_defaults(run=module.run)
    args, unknown = parser.parse_known_args(argv)
    if handed_on is not None:
        args.arguments = handed_on
    for option in _empty_options(commands.choices[args.command], args):
        parser.error(f"{option}: got an empty text; is a variable not set?")
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}{_did_you_mean(unknown, commands.choices[args.command])}"
        )
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has seen enough: fastdeit explain MODEL | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, TransformError) as error:
        print(f"fastdeit {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastdeit {args.command}: interrupted", file=sys.stderr)
        return 130
