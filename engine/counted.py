"""How a number of things is written in messages."""


def counted(number: int, one: str, several: str | None = None) -> str:
    """``1 request``, ``2 requests``, ``0 requests``. ``several``: the plural where it is not ``one`` and an s."""
    return f"{number} {one if number == 1 else several or one + 's'}"
