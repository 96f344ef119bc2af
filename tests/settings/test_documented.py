"""docs/settings.md names the tests that hold what it says."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_row_names_tests_that_exist_and_every_file_here_is_named():
    text = (ROOT / "docs" / "settings.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.endswith("| test |")]
    assert all(re.search(r"`tests/\S+\.py`", row) for row in rows)
    named = set(re.findall(r"tests/\S+?\.py", text))
    assert all((ROOT / name).is_file() for name in named)
    here = {f"tests/settings/{file.name}" for file in Path(__file__).parent.glob("test_*.py")}
    assert here - named == {"tests/settings/test_documented.py"}
