"""Makes text from untrusted files safe to print in a terminal or a log."""

MAX_CHARACTERS = 120


def terminal_safe(text: str) -> str:
    """``text``, shortened to a line, with control characters and changes of the writing direction escaped."""
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text[:MAX_CHARACTERS])
    return shown + ("..." if len(text) > MAX_CHARACTERS else "")
