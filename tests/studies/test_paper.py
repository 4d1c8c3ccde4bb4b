"""docs/studies/paper.md has the numbers that its command computes from the committed rows, and stays short."""

import re
from pathlib import Path

import pytest

from tests.benchmarks.paper.tables import everything

PAGE = Path("docs/studies/paper.md")
INTERVAL = re.compile(r"-?\d[\d.,]* \(-?[\d.]+ to -?[\d.]+\)")
LIMIT = 12 * 1024  # bytes


@pytest.fixture(scope="module")
def computed():
    return everything()


def wrong(page: str, computed: str) -> list[str]:
    """The rows of tables and the intervals of a page that are not among what was computed."""
    rows = {line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| ---")}
    intervals = set(INTERVAL.findall(" ".join(page.split())))  # a line may end within one
    return sorted([*(rows - set(computed.splitlines())), *(intervals - set(INTERVAL.findall(computed)))])


def test_the_page_has_the_numbers_of_the_rows(computed):
    page = PAGE.read_text(encoding="utf-8")
    assert wrong(page, computed) == []
    assert len(INTERVAL.findall(page)) > 60
    assert len(page.encode()) <= LIMIT


def test_a_wrong_number_is_found(computed):
    page = PAGE.read_text(encoding="utf-8")
    first = INTERVAL.search(page)
    assert first is not None
    other = first[0].replace(" (", "9 (")
    assert wrong(page.replace(first[0], other, 1), computed) == [other]
    table = "| SDXL, rank 1 | 0.143 (0.066 to 0.219) | 0.0035 (0.9)"
    assert wrong(table, computed) == [table]
