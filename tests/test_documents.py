"""Links between Markdown pages lead somewhere, and the source files that pages name exist."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("parallel", "model", "engine", "cluster", "serve", "benchmarks", "tests", "docs", "client", "k8s", ".ci")
FILES = sorted([*ROOT.glob("*.*"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.*"))])
PAGES = [file for file in FILES if file.suffix == ".md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
SOURCE_FILE = re.compile(r"`((?:[\w.-]+/)*\w[\w.-]*\.(?:py|cpp|h|md|toml))`")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in HEADING.findall(CODE_BLOCK.sub("", page.read_text())))
    return frozenset(re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles)


def broken_links(page: Path) -> Iterator[str]:
    for target in LINK.findall(CODE_BLOCK.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        if ":" in path:  # http:, https:, mailto:
            continue
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            yield target


def test_links_lead_somewhere() -> None:
    assert len(PAGES) > 50
    assert [(str(page.relative_to(ROOT)), link) for page in PAGES for link in broken_links(page)] == []


def test_source_files_that_pages_name_exist() -> None:
    """Pages may leave out the first folders of a path."""
    known = {"/".join(file.relative_to(ROOT).parts[start:]) for file in FILES for start in range(len(file.relative_to(ROOT).parts))}
    named = [(str(page.relative_to(ROOT)), name) for page in PAGES for name in SOURCE_FILE.findall(page.read_text())]
    assert len(named) > 200
    assert [(page, name) for page, name in named if name not in known] == []
