"""Words out of files that somebody else wrote, fit for a terminal and a log."""

MOST_CHARACTERS = 120


def readable(text: str) -> str:
    """``text`` with what steers a terminal, or turns the direction of writing, spelled out, and no longer than a line."""
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text[:MOST_CHARACTERS])
    return shown + ("..." if len(text) > MOST_CHARACTERS else "")
