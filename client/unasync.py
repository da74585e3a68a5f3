"""Generate the synchronous client from the asynchronous one: `python client/unasync.py` (`--check` only compares).

The table below has all differences. The replacements are applied in order.
"""

import re
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "src/manta_client/_async"
TARGET = SOURCE.parent / "_sync"
NOTE = "# Generated from `{name}` by client/unasync.py. Do not edit.\n"

WORDS = (
    (r"import asyncio\n", "import time\n"),
    (r"import grpc\.aio\n", ""),
    (r"grpc\.aio\.", "grpc."),
    (r"asyncio\.sleep", "time.sleep"),
    (r"asyncio\.CancelledError", "grpc.FutureCancelledError"),
    (r"Callable\[\[\], Awaitable\[(.+)\]\](?=\W)", r"Callable[[], \1]"),
    (r"AsyncIterator, Awaitable, Callable", "Callable, Iterator"),
    (r"async (def|for|with)\b", r"\1"),
    (r"await ", ""),
    (r"\baiter\(", "iter("),
    (r"\banext\(", "next("),
    (r"__aiter__", "__iter__"),
    (r"__anext__", "__next__"),
    (r"__aenter__", "__enter__"),
    (r"__aexit__", "__exit__"),
    (r"StopAsyncIteration", "StopIteration"),
    (r"\bAsync(?=[A-Z])", ""),
    (r"asynchronous client; `_sync` is generated from it by `unasync.py`", "synchronous client"),
)


def main() -> None:
    wanted = {path.name: to_sync(path.read_text(), path.name) for path in sorted(SOURCE.glob("*.py"))}
    if "--check" in sys.argv:
        stale = [name for name, text in wanted.items() if not (TARGET / name).exists() or (TARGET / name).read_text() != text]
        sys.exit(f"stale: {', '.join(stale)}; run python client/unasync.py" if stale else 0)
    TARGET.mkdir(exist_ok=True)
    for name, text in wanted.items():
        (TARGET / name).write_text(text)


def to_sync(text: str, name: str) -> str:
    for pattern, replacement in WORDS:
        text = re.sub(pattern, replacement, text)
    return NOTE.format(name=f"_async/{name}") + text


if __name__ == "__main__":
    main()
