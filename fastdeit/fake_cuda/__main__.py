"""`python -m fastdeit.fake_cuda [--devices N] [--capability 9.0] ARGUMENTS`: runs `python ARGUMENTS` on fake devices."""

import argparse
import re
import sys

from fastdeit.fake_cuda.process import start_python


def _capability(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"(\d+)\.(\d)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 9.0")
    return int(found[1]), int(found[2])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdeit.fake_cuda", description=__doc__)
    parser.add_argument("--devices", type=int, default=1, help="how many fake GPUs (1)")
    parser.add_argument("--capability", type=_capability, default=(9, 0), help="their compute capability (9.0)")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of python: a script, or -m and a module")
    args = parser.parse_args()
    try:
        with start_python(*args.arguments, devices=args.devices, capability=args.capability) as process:
            return process.wait()
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
