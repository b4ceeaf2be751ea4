"""README.md keeps its word: its results name what prints them, its links and pictures are there."""

import re
from pathlib import Path

import pytest

from support.pages import PAGES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))


def broken_links(page: Path) -> list[str]:
    """Relative links and pictures of a page that lead nowhere."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    return [to for to in targets if "://" not in to and not (page.parent / to).exists()]


def test_make_has_the_targets() -> None:
    named = set(re.findall(r"\bmake ([a-z][\w-]*)\b +#", README))
    assert named == {"demo", "test"}
    assert named <= make_targets()
    assert "no-such-target" not in make_targets()


def test_every_result_names_what_prints_it() -> None:
    table = README.partition("## Measured")[2].partition("## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 4
    for _, result, source in rows:
        assert re.search(r"\d", result)
        name = source.strip().strip("`")
        assert (ROOT / name.split()[0]).is_file() or name.removeprefix("make ") in make_targets(), name


def test_what_the_cloud_can_see_is_said_in_bold_here_and_in_the_security_page() -> None:
    bold = [re.findall(r"\*\*(The worker .+?)\*\*", page.read_text(), flags=re.S) for page in PAGES[:2]]
    here, there = (" ".join(found[0].split()) for found in bold)
    assert here == there
    assert "not from the worker's operator" in here
    assert "answers that a chat teaches are input tokens too" in here


def test_no_page_says_that_labels_stay_where_answers_are_input_tokens() -> None:
    """SECURITY.md says of which labels it is true."""
    for page in PAGES:
        text = " ".join(page.read_text(encoding="utf-8").split())
        assert not re.search(
            r"[Ll]abels,? (and|or) adapters? |files, labels|data, labels|no label ever", text
        ), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("[a](b.md) ![c](page.md) [d](https://example.org) [e](page.md#top)")
    assert broken_links(tmp_path / "page.md") == ["b.md"]


def test_every_page_is_on_the_list_of_pages() -> None:
    listed = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in listed} == set()


def test_the_screenshot_is_light_to_load() -> None:
    picture = ROOT / "docs" / "images" / "report.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 300_000
