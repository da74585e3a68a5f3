"""docs/layouts.md is what the planner says now."""

from pathlib import Path

from serve.planning.layouts_page import COMMAND, layouts_page

PAGE = Path(__file__).parents[3] / "docs" / "layouts.md"


def test_the_page_is_what_the_planner_writes() -> None:
    assert PAGE.read_text() == layouts_page(), f"the planner says something else now; read the difference, then: {COMMAND}"
