"""Runs every `check_*` function of a file and prints, as JSON, its traceback or None: `python run_checks.py FILE`.

For what cannot run in pytest's own process, where kernels are interpreted.
"""

import importlib.util
import json
import sys
import traceback


def outcomes(path: str) -> dict[str, str | None]:
    spec = importlib.util.spec_from_file_location("checks", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["checks"] = module
    spec.loader.exec_module(module)
    found = {}
    for name, check in list(vars(module).items()):
        if name.startswith("check_"):
            try:
                check()
                found[name] = None
            except Exception:
                found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    print(json.dumps(outcomes(sys.argv[1])))
