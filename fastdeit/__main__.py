"""`python -m fastdeit` is the `fastdeit` command."""

import sys

from fastdeit.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
