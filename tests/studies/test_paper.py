"""docs/studies/paper.md has the numbers that its command computes from the committed rows, and stays short."""

import re
from pathlib import Path

import pytest

from tests.benchmarks.paper.tables import everything

PAGE, LOG = Path("docs/studies/paper.md"), Path("docs/studies/log.md")
CI = re.compile(r"-?\d[\d.,]* \(-?[\d.]+ to -?[\d.]+\)")
LIMIT = 12 * 1024  # bytes


@pytest.fixture(scope="module")
def computed():
    return everything()


def wrong_rows(page: str, computed: str) -> set[str]:
    """The rows of tables that are not among what was computed."""
    return {line for line in page.splitlines() if line.startswith("| ")} - set(computed.splitlines())


def wrong_confidence_intervals(page: str, computed: str) -> set[str]:
    """The intervals in text and tables that are not among what was computed."""
    return set(CI.findall(" ".join(page.split()))) - set(CI.findall(computed))  # a line may end in one


def test_the_page_has_the_numbers_of_the_rows(computed):
    page = PAGE.read_text(encoding="utf-8")
    assert wrong_rows(page, computed) == set()
    assert wrong_confidence_intervals(page, computed) == set()
    assert len(CI.findall(page)) > 60
    assert len(page.encode()) <= LIMIT
    assert wrong_confidence_intervals(LOG.read_text(encoding="utf-8"), computed) == set()


def test_a_wrong_number_is_found(computed):
    page = PAGE.read_text(encoding="utf-8")
    found = CI.search(page)
    assert found is not None
    other = found[0].replace(" (", "9 (")
    assert wrong_confidence_intervals(page.replace(found[0], other), computed) == {other}
    row = "| SDXL, rank 1 | 0.143 (0.066 to 0.219) | 0.0035 (0.9)"
    assert wrong_rows(f"{page}{row}\n", computed) == {row}
