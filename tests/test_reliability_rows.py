"""Every row of the table of 35 faults (RELIABILITY.md, section 3) is named in the test that proves it."""

import re
from pathlib import Path

ROWS = range(1, 36)


def rows_named() -> dict[int, list[str]]:
    """The test files that name a row as ``RELIABILITY row N``, or several as ``rows N, M``, by row."""
    found: dict[int, list[str]] = {}
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        for numbers in re.findall(r"RELIABILITY rows? ((?:\d+(?:, | and )?)+)", path.read_text(encoding="utf-8")):
            for number in re.findall(r"\d+", numbers):
                found.setdefault(int(number), []).append(path.name)
    return found


def test_all_rows_of_the_table_of_faults_are_proved():
    missing = [row for row in ROWS if row not in rows_named()]
    assert not missing, f"rows without a test: {missing}"
