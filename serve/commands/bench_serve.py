"""`manta bench serve`: put load on a running server, Manta's or any other with OpenAI's API."""

import asyncio
import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.counted import counted
from serve.commands.progress import progress_shown
from serve.commands.settings import WRONG_USAGE, exit_if_no_key, exit_with_error

if TYPE_CHECKING:
    from serve.load.client import Answer, Api, Target
    from serve.load.workloads import Conversation

INTERRUPTED = 130


def bench_serve(
    url: Annotated[str, typer.Argument(help="Base URL of the API.")] = "http://127.0.0.1:8000/v1",
    workload: Annotated[str, typer.Option("--workload", "-w", help="W1 to W10, see above.")] = "W3",
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="Number of requests (of conversations for W1 and W8).")] = 64,
    rate: Annotated[float, typer.Option("--rate", help="Mean arrivals per second.")] = 2.0,
    scale: Annotated[float, typer.Option("--scale", help="Factor for all lengths; 0.1 suits a small machine.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed for prompts and arrival times.")] = 0,
    ttft: Annotated[float, typer.Option("--slo-ttft", help="SLO: seconds to the first token.")] = 1.0,
    itl: Annotated[float, typer.Option("--slo-itl", help="SLO: mean seconds between tokens.")] = 0.1,
    api: Annotated[str, typer.Option("--api", help="chat or completions.")] = "chat",
    model: Annotated[str | None, typer.Option("--model", help="Model name; by default the first that the server lists.")] = None,
    key: Annotated[str | None, typer.Option("--key", envvar="OPENAI_API_KEY", help="API key.")] = None,
    extra: Annotated[str, typer.Option("--extra", help="JSON object merged into every request body.")] = "{}",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures and each request's times to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Plot the distributions to this file (.png, .svg; needs matplotlib).")] = None,
) -> None:
    """Load-test any OpenAI-compatible server and print latency and throughput as its clients see them.

    Open loop: requests are sent at times fixed in advance, however slow the server is, and latency is counted from the time a
    request was due. The same seed gives the same requests, so that two servers can be compared.

    \b
      W1  one stream, growing prompts       W6   long prompts among short ones
      W2  all requests at once              W7   bursts
      W3  chat                              W8   multi-turn conversations
      W4  a grid of lengths                 W9   JSON that follows a schema
      W5  shared prefixes                   W10  one client in five disconnects

    \b
      manta bench serve                              W3, a server on this machine
      manta bench serve http://host:8000/v1 -w W6 --rate 4 -n 200 --json long.json
      manta bench serve http://other:8000/v1 --extra '{"ignore_eos": true}'
    """
    from serve.load.workloads import WORKLOADS, Shape

    if workload.upper() not in WORKLOADS:
        exit_with_error(f"no workload is called {workload!r}; there are: {', '.join(WORKLOADS)}", code=WRONG_USAGE)
    if api not in ("chat", "completions"):
        exit_with_error(f"--api is {api!r}; it is chat or completions", code=WRONG_USAGE)
    if not (0 < rate < math.inf and 0 < scale < math.inf):
        exit_with_error(f"--rate and --scale must be above 0 and finite, got {rate:g} and {scale:g}", code=WRONG_USAGE)
    if not (ttft > 0 and itl > 0):  # nan is neither
        exit_with_error(f"--slo-ttft and --slo-itl must be above 0, got {ttft:g} and {itl:g}", code=WRONG_USAGE)
    if not url.startswith(("http://", "https://")):
        exit_with_error(f"{url!r} is not the URL of an API; write for example http://127.0.0.1:8000/v1", code=WRONG_USAGE)
    if key:
        exit_if_no_key(key)
    _check_outputs(json_file, plot)
    from serve.load.client import Target, find_model
    from serve.load.report import Objective, as_json, lines_of, summarise, table_of
    from serve.terminal import results, wrapped

    chosen = WORKLOADS[workload.upper()]
    conversations = chosen.conversations(Shape(requests=requests, rate=rate, scale=scale, seed=seed))
    try:
        more = _object(extra)
        url = url.rstrip("/")
        name = model or asyncio.run(find_model(url, key))
        answers, interrupted = _run(Target(url=url, model=name, api=_api(api), key=key, extra=more), conversations)
        objective = Objective(ttft_s=ttft, itl_s=itl)
        summary = summarise(answers, objective)
        title = f"{chosen.name}: {chosen.about} | {name} at {url}, {rate:g}/s, seed {seed}"
        console = results()
        for line in (*lines_of(summary, objective), title):
            console.print("\n".join(wrapped(line, console.width, then="  ")), markup=False, soft_wrap=True)
        console.print(table_of(summary))
        if json_file is not None:
            json_file.write_text(json.dumps({"title": title, **as_json(summary, answers)}, indent=1) + "\n")
        if plot is not None:
            from serve.load.plots import draw

            draw(answers, title, plot)
    except ValueError as error:
        exit_with_error(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if interrupted:
        typer.echo(f"manta: interrupted; {counted(len(answers), 'request')} had ended before", err=True)
        raise typer.Exit(INTERRUPTED)
    if summary.done == 0:
        raise typer.Exit(1)


def _check_outputs(json_file: Path | None, plot: Path | None) -> None:
    """Leaves the program where the results could not be written: before they are measured."""
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        exit_with_error("plots need matplotlib: pip install matplotlib")
    for path in filter(None, (json_file, plot)):
        if not path.parent.is_dir() or path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            exit_with_error(f"{path} cannot be written")


def _run(target: "Target", conversations: Sequence["Conversation"]) -> tuple[list["Answer"], bool]:
    """The answers, and whether Ctrl-C ended it: then those that had ended."""
    from serve.load.client import run

    total, ended = sum(len(conversation.turns) for conversation in conversations), list["Answer"]()
    with progress_shown() as report:
        report("requests under way", 0.0)

        def count(answer: "Answer") -> None:
            ended.append(answer)
            report("requests under way", len(ended) / total)

        try:
            return asyncio.run(run(target, conversations, count)), False
        except KeyboardInterrupt:
            if not ended:
                raise
            return ended, True


def _api(name: str) -> "Api":
    return "chat" if name == "chat" else "completions"


def _object(text: str) -> dict[str, object]:
    """The value of --extra.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--extra is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"--extra must be a JSON object, got {text}")
    return value
