"""Counts what the faults came to, and prints the table at the end of a campaign."""

from collections import defaultdict

import pytest

COLUMNS = ("faults tried", "clean errors", "absorbed", "silent damage", "lost results")
TALLY = defaultdict(lambda: dict.fromkeys(COLUMNS, 0))


@pytest.fixture
def tally(request):
    """``tally(fault, outcome)`` counts a fault tried and what came of it; the last two columns fail the test."""

    def count(fault, outcome, detail=""):
        row = TALLY[fault]
        row["faults tried"] += 1
        row[outcome] += 1
        assert outcome in ("clean errors", "absorbed"), f"{fault}: {outcome} {detail}"

    return count


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("markexpr") != "faults" or not TALLY:
        return
    total = {column: sum(row[column] for row in TALLY.values()) for column in COLUMNS}
    print_row = terminalreporter.write_line
    print_row("")
    print_row("| fault | " + " | ".join(COLUMNS) + " |")
    print_row("|---|" + "---|" * len(COLUMNS))
    for name, row in [*TALLY.items(), ("all", total)]:
        print_row(f"| {name} | " + " | ".join(str(row[column]) for column in COLUMNS) + " |")
