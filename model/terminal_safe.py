"""Words out of files that somebody else wrote, fit for a terminal and a log."""

MAX_CHARACTERS = 120


def terminal_safe(text: str) -> str:
    """``text`` with what steers a terminal, or turns the direction of writing, spelled out, and no longer than a line."""
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text[:MAX_CHARACTERS])
    return shown + ("..." if len(text) > MAX_CHARACTERS else "")
