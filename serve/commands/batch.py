"""`manta batch`: a file of requests, a file of answers."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from serve.commands.settings import WRONG_USAGE, exit_with_error

SOME_FAILED = 3
"""Leaves with it where every request has its line, and not every line an answer."""
INTERRUPTED = 130
REQUEST_TIMEOUT_S = 3600.0
READY_TIMEOUT_S = 60.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
MOST_NAMED = 8
"""Lines of the output that are named after a run; the others are counted."""


def batch(
    requests: Annotated[Path, typer.Argument(help="JSON lines in OpenAI's batch format: custom_id, method, url, body.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the answers go, a line each, in the order in which they come.")],
    url: Annotated[str, typer.Option("--url", help="A running server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option("--api-key", help="Else $MANTA_API_KEY.")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, max=1024, help="Requests at the same time.")] = 32,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed in an earlier run.")] = False,
) -> None:
    """Answer a file of requests through a running server.

    Interrupted by Ctrl-C or killed, the same command goes on where it was: no line is lost or written twice.

    Leaves with 0 where every request is answered; with 3 where some failed, which have the error in their line and are named at
    the end; with 1 where the batch could not be run; with 130 where it was interrupted.

    \b
      manta serve demo
      manta batch in.jsonl -o out.jsonl
      manta batch in.jsonl -o out.jsonl --retry-failed
    """
    import httpx

    from serve.batch import BatchError, finished, forget_failures, read_items, run_batch, wait_until_ready

    if not url.startswith(("http://", "https://")):
        exit_with_error(f"--url {url!r} is no URL of a server; it is like http://127.0.0.1:8000", code=WRONG_USAGE)
    key = api_key or os.environ.get("MANTA_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    stopped, shown = threading.Event(), None
    try:
        items = read_items(requests)
        finished(output)
        elsewhere = urlsplit(url).hostname not in LOOPBACK  # no proxy reaches this machine
        with httpx.Client(base_url=url, headers=headers, timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=elsewhere) as client:
            if not wait_until_ready(client, timeout_s=0.0):
                typer.echo(f"waiting up to {READY_TIMEOUT_S:g} s for a server at {url}", err=True)
                if not wait_until_ready(client, timeout_s=READY_TIMEOUT_S):
                    exit_with_error(f"no server answers at {url}; start one with `manta serve`, or say --url")
            if retry_failed:
                forget_failures(output, {item.custom_id for item in items})
            with progress_of(len(items)) as bar:
                for shown in run_batch(items, output, client, concurrency=concurrency, stop=stopped):
                    bar(shown.done, shown.failed)
    except OSError as error:
        exit_with_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except BatchError as error:
        exit_with_error(str(error))
    except KeyboardInterrupt:
        stopped.set()
        typer.echo("\ninterrupted; the same command goes on where this one was", err=True)
        os._exit(INTERRUPTED)  # answers under way are not waited for
    assert shown is not None
    typer.echo(f"{shown.done - shown.failed} of {shown.total} requests are answered in {output}", err=True)
    if shown.failed:
        exit_with_error(_failed(output, {item.custom_id for item in items}), code=SOME_FAILED)


def _failed(output: Path, asked: set[str]) -> str:
    """How many of the requests failed, in which lines of the output, and why the first did."""
    from serve.batch import failures

    failed = [failure for failure in failures(output) if failure.custom_id in asked]
    named = ", ".join(str(failure.line) for failure in failed[:MOST_NAMED]) + (", ..." if len(failed) > MOST_NAMED else "")
    which, (first, *others) = f"line{'s' if len(failed) > 1 else ''} {named} of {output}", failed
    why = f"{'the first, ' if others else ''}{first.custom_id}, {first.reason}"
    return f"{len(failed)} failed: {which} ({why}); --retry-failed asks again"


@contextmanager
def progress_of(total: int) -> Iterator[Callable[[int, int], None]]:
    """On stderr: a bar that is told how many are done and how many of them failed; without a terminal a line for each tenth."""
    from serve.terminal import can_redraw

    if not can_redraw():
        yield _lines(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("batch", total=total, failed=0)
        yield lambda done, failed: progress.update(task, completed=done, failed=failed)


def _lines(total: int) -> Callable[[int, int], None]:
    said = 0

    def report(done: int, failed: int) -> None:
        nonlocal said
        if total and 10 * done // total > said:
            said = 10 * done // total
            typer.echo(f"{done} of {total} done, {failed} failed", err=True)

    return report
