"""The figures in the pages are those that benchmarks printed, kept whole in docs/figures."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from benchmarks.figures import MACHINE, ROOT, NotPrinted, excerpt, fill, filled, machine, names, pages, parsed

if TYPE_CHECKING:
    from pathlib import Path

PRINTED = """\
server_version 18.6

1 key, 0 ms away
                         operations/s     × UPDATE   p50 ms

4 × 1 callers
  UPDATE, pool of 1   1,000 (900 to 1,100)   1.00 (1.00 to 1.00) 2.00 (1.00 to 3.00)
  batches             12 (11 to 13)          0.01 (0.00 to 0.02) 3.00 (1.00 to 5.00)  a note

4 × 5 callers
  UPDATE, pool of 2   7 (6 to 8)   1.00 (1.00 to 1.00) 2.00 (1.00 to 3.00)

so batches are ahead from 5 callers
"""


def shown(marker: str) -> str:
    return excerpt(PRINTED, parsed(marker))


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: page.stem)
def test_a_page_shows_what_was_printed(page: Path) -> None:
    missing: list[str] = []
    text = page.read_text()
    assert filled(text, ROOT / "docs/figures", missing) == text, "python -m benchmarks.figures writes it"
    assert missing == []


def test_what_pages_quote_can_be_run() -> None:
    assert {"hot_row", "stores", "processes", "parts"} <= {*names(ROOT)}
    assert [name for name in names(ROOT) if not find_spec(name if "." in name else f"benchmarks.{name}")] == []


def test_every_file_of_figures_is_quoted() -> None:
    assert sorted(file.stem for file in (ROOT / "docs/figures").glob("*")) == sorted([*names(ROOT), MACHINE])


def test_a_part_is_what_stands_up_to_the_next_empty_line_as_it_was_printed() -> None:
    assert shown("a; from: so batches") == "so batches are ahead from 5 callers"
    assert shown("a; from: 4 × 5 callers").splitlines()[0] == "4 × 5 callers"
    assert shown("a") == PRINTED.rstrip()


def test_of_a_table_the_medians_of_some_rows_and_columns_are_shown_under_the_head_that_is_above() -> None:
    assert shown("a; from: 1 key > 4 × 1; medians; without: × UPDATE").splitlines() == [
        "1 key, 0 ms away",
        "4 × 1 callers",
        "                   operations/s  p50 ms",
        "UPDATE, pool of 1         1,000    2.00",
        "batches                      12    3.00  a note",
    ]
    assert shown("a; from: 4 × 1 | 4 × 5; medians; rows: UPDATE").splitlines() == [
        "4 × 1 callers",
        "                   operations/s  × UPDATE  p50 ms",
        "UPDATE, pool of 1         1,000      1.00    2.00",
        "",
        "4 × 5 callers",
        "                   operations/s  × UPDATE  p50 ms",
        "UPDATE, pool of 2             7      1.00    2.00",
    ]


@pytest.mark.parametrize("marker", ["a; from: 4 × 9", "a; from: so batches > 4 × 1"])
def test_a_part_that_was_not_printed_is_named(marker: str) -> None:
    with pytest.raises(NotPrinted, match="a has printed no line that begins with '4 ×"):
        shown(marker)


@pytest.mark.parametrize("marker", ["a; medians; rows: batches | none", "a; medians; without: none"])
def test_a_row_or_a_column_that_was_not_printed_is_named(marker: str) -> None:
    with pytest.raises(NotPrinted, match=r"a has printed no (row|column) none"):
        shown(marker)


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no median"):
        parsed("a; median")


def test_pages_are_filled_and_what_a_short_run_does_not_print_stays(tmp_path: Path) -> None:
    (tmp_path / "docs/figures").mkdir(parents=True)
    (tmp_path / "docs/figures/a.txt").write_text(PRINTED)
    page = tmp_path / "README.md"
    page.write_text(
        "before\n\n<!-- printed: a; from: so -->\n<!-- printed -->\n\n<!-- printed: b -->\nold\n<!-- printed -->\n"
    )
    with pytest.raises(NotPrinted, match=r"^b: "):
        fill(tmp_path)
    assert page.read_text() == (
        "before\n\n"
        "<!-- printed: a; from: so -->\n```text\nso batches are ahead from 5 callers\n```\n<!-- printed -->\n\n"
        "<!-- printed: b -->\nold\n<!-- printed -->\n"
    )
    (missing,) = fill(tmp_path, may_miss=True)
    assert missing.startswith("b: ")
    assert names(tmp_path) == ["a", "b"]


def test_the_machine_is_named_with_the_versions() -> None:
    said = machine()
    assert "cores" in said
    assert "gevent " in said
