"""`python -m fastdeit.testing.fake_cuda [--devices N] [--capability 9.0] ARGUMENTS`: runs `python ARGUMENTS` on fake devices."""

import argparse
import re
import sys
from collections.abc import Sequence

from fastdeit.testing.fake_cuda.process import start_python


def _capability(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"(\d+)\.(\d)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 9.0")
    return int(found[1]), int(found[2])


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m fastdeit.testing.fake_cuda", description=__doc__)
    parser.add_argument("--devices", type=int, default=1, help="how many fake GPUs (1)")
    parser.add_argument("--capability", type=_capability, default=(9, 0), help="their compute capability (9.0)")
    parser.usage = f"{parser.prog} [--devices N] [--capability X.Y] SCRIPT | -m MODULE [ARGUMENTS ...]"
    options = 0
    while options < len(argv) and argv[options].startswith(("--", "-h")):  # what follows is python's, options too
        options += 1 if "=" in argv[options] else 2
    args = parser.parse_args(argv[:options])
    if not argv[options:]:
        parser.error("expected a script, or -m and a module")
    try:
        with start_python(*argv[options:], devices=args.devices, capability=args.capability) as process:
            return process.wait()
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
