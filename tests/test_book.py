"""Pins how the notebooks read: short cells, each definition used before the next, headings alone, the field's words."""

import re
import statistics
from pathlib import Path

import pytest
from book import REPLACED, measure

ROOT = Path(__file__).resolve().parent.parent
TESTS = sorted((ROOT / "tests").glob("test_*.py"))


@pytest.fixture(scope="module")
def book():
    return measure()


def test_half_of_the_exported_cells_are_very_short(book):
    assert statistics.median(book.lines) <= 14


def test_exported_cells_are_short(book):
    assert book.nine_in_ten < 32
    assert book.lines[-1] < 80, max(book.cells)


def test_definitions_are_used_before_the_next_is_made(book):
    assert book.share_shown >= 0.7, book.unshown


def test_headings_stand_alone(book):
    assert not book.mixed


def test_the_words_are_those_of_the_field(book):
    assert not book.replaced


def test_links_to_the_glossary_find_its_headings():
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "pages" / "glossary.md").read_text(encoding="utf-8"), re.M)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}
    for path in [*(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "docs" / "pages").glob("*.md")]:
        assert set(re.findall(r"glossary\.md#([\w-]+)", path.read_text(encoding="utf-8"))) <= anchors, path


PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_the_pages_use_the_same_words(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if REPLACED.search(line) and "lesion study" not in line]


def test_lines_end_before_column_120(book):
    assert not book.wide


def test_every_chapter_has_a_figure(book):
    chapters = {n for n in book.without_figure if "/" not in n}
    assert chapters <= {"01_sites.ipynb", "12_command.ipynb"}


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.name)
def test_tests_pin_no_wording(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"pytest\.(?:raises|warns)\([^)]*\bmatch=", text), "check the type, and .argument"


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.name)
def test_tests_import_no_other_test(path):
    text = path.read_text(encoding="utf-8")
    others = set(re.findall(r"^\s*from (test_\w+) import", text, re.M)) - {path.stem}
    assert not others, "what tests share stands in a file without tests"
