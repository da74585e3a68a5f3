"""`manta bench serve`: load for a running server, ours or another's."""

import asyncio
import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve.commands.progress import progress_shown
from serve.commands.settings import exit_with_error

if TYPE_CHECKING:
    from serve.load.client import Answer, Api, Target
    from serve.load.workloads import Conversation

INTERRUPTED = 130


def bench_serve(
    url: Annotated[str, typer.Argument(help="The API's address.")] = "http://127.0.0.1:8000/v1",
    workload: Annotated[str, typer.Option("--workload", "-w", help="W1 to W10, see above.")] = "W3",
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="How many (conversations, in W1 and W8).")] = 64,
    rate: Annotated[float, typer.Option("--rate", help="Arrivals per second, on average.")] = 2.0,
    scale: Annotated[float, typer.Option("--scale", help="Of all lengths: 0.1 for a small machine.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Another seed, other prompts and times.")] = 0,
    ttft: Annotated[float, typer.Option("--slo-ttft", help="Seconds to the first token that a good request keeps.")] = 1.0,
    itl: Annotated[float, typer.Option("--slo-itl", help="Seconds between its tokens, on average.")] = 0.1,
    api: Annotated[str, typer.Option("--api", help="chat or completions.")] = "chat",
    model: Annotated[str | None, typer.Option("--model", help="None: the first that the server lists.")] = None,
    key: Annotated[str | None, typer.Option("--key", envvar="OPENAI_API_KEY", help="API key.")] = None,
    extra: Annotated[str, typer.Option("--extra", help="JSON object that goes into every request's body.")] = "{}",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write figures and every request's times here.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the distributions (.png, .svg; wants matplotlib).")] = None,
) -> None:
    """Put a load on any OpenAI endpoint and print what its clients saw.

    Open loop: requests are sent at times fixed beforehand, however slow the server is, and waiting is counted from the time a
    request was due. The same seed asks the same again, so that two servers can be compared.

    \b
      W1  one stream, growing prompts       W6   long prompts among short
      W2  all at once                       W7   bursts
      W3  chat                              W8   conversations
      W4  a grid of lengths                 W9   JSON after a schema
      W5  shared prefixes                   W10  one client in five goes away

    \b
      manta bench serve                                                a server on this machine, W3
      manta bench serve http://host:8000/v1 -w W6 --rate 4 -n 200 --json long.json
      manta bench serve http://other:8000/v1 -w W3 --extra '{"ignore_eos": true}' --plot chat.png
    """
    from serve.load.workloads import WORKLOADS, Shape

    if workload.upper() not in WORKLOADS:
        exit_with_error(f"no workload is called {workload!r}; there are: {', '.join(WORKLOADS)}")
    if api not in ("chat", "completions"):
        exit_with_error(f"--api is {api!r}; it is chat or completions")
    if not (0 < rate < math.inf and 0 < scale < math.inf):
        exit_with_error(f"--rate and --scale must be above 0 and finite, got {rate:g} and {scale:g}")
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
        typer.echo(f"manta: interrupted; these are the {len(answers)} requests that had ended", err=True)
        raise typer.Exit(INTERRUPTED)
    if summary.done == 0:
        raise typer.Exit(1)


def _check_outputs(json_file: Path | None, plot: Path | None) -> None:
    """Leaves the program where the results could not be written: before they are measured."""
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        exit_with_error("plots want matplotlib: pip install matplotlib")
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
    """
    Raises:
        ValueError: not a JSON object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--extra is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"--extra must be a JSON object, got {text}")
    return value
