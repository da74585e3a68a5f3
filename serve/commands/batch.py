"""`manta batch`: a file of requests, a file of answers."""

import os
import threading
from pathlib import Path
from typing import Annotated

import typer

from serve.commands.settings import stop

INTERRUPTED = 130
REQUEST_TIMEOUT_S = 3600.0
READY_TIMEOUT_S = 60.0


def batch(
    requests: Annotated[Path, typer.Argument(help="JSON lines in OpenAI's batch format: custom_id, method, url, body.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the answers go, a line each, in the order in which they come.")],
    url: Annotated[str, typer.Option("--url", help="A running server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option("--api-key", help="Else $MANTA_API_KEY.")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, max=1024, help="Requests at the same time.")] = 32,
) -> None:
    """Answer a file of requests through a running server.

    Interrupted by Ctrl-C or killed, the same command goes on where it was: no line is lost or written twice.

    \b
      manta serve demo
      manta batch in.jsonl -o out.jsonl
    """
    import httpx

    from serve.batch import BatchError, finished_ids, read_items, run_batch, wait_until_ready

    key = api_key or os.environ.get("MANTA_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    stopped, shown = threading.Event(), None
    try:
        items = read_items(requests)
        finished_ids(output)
        with httpx.Client(base_url=url, headers=headers, timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
            if not wait_until_ready(client, timeout_s=READY_TIMEOUT_S):
                stop(f"no server answers at {url}; start one with `manta serve`, or say --url")
            with _bar(len(items)) as bar:
                for shown in run_batch(items, output, client, concurrency=concurrency, stop=stopped):
                    bar(shown.done, shown.failed)
    except (BatchError, OSError) as error:
        stop(str(error))
    except KeyboardInterrupt:
        stopped.set()
        typer.echo("\ninterrupted; the same command goes on where this one was", err=True)
        os._exit(INTERRUPTED)  # answers under way are not waited for
    assert shown is not None
    refused = f"; {shown.failed} of this run with an error, see their status_code" if shown.failed else ""
    typer.echo(f"{shown.done} of {shown.total} requests have their line in {output}{refused}", err=True)


class _bar:  # noqa: N801  (used like a function)
    """A progress bar on stderr."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("batch", total=total, failed=0)

    def __enter__(self) -> "_bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, failed: int) -> None:
        self._progress.update(self._task, completed=done, failed=failed)
