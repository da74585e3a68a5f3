"""The `manta` command line. Each command is a file in `serve/commands/` and imports heavy modules only when it runs."""

import atexit
import errno
import io
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from serve.commands import batch, bench, bench_serve, chat, config, demo_model, doctor, keys, plan, serve, status, up
from serve.commands.flag_hints import CommandWithFlagHints

HELP = """Serve Qwen2 models over HTTP (OpenAI's API) and gRPC, on one machine or a Ray cluster.

Getting started:

\b
  manta serve demo --tensor-parallel 2  serve a small English model, two ranks
  manta chat "Why is the sky blue?"     ask it, from another terminal
  manta config                          every setting with meaning and value
"""


class _EngineByDefault(TyperGroup):
    """`manta bench demo` means `manta bench engine demo`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_named = bool(args) and (args[0] in self.commands or args[0] in ("-h", "--help"))
        return super().parse_args(ctx, args if is_named else ["engine", *args])


benches = typer.Typer(cls=_EngineByDefault, help="Benchmark the engine on this machine, or a running server.", rich_markup_mode=None)
benches.command("engine", cls=CommandWithFlagHints, short_help="Benchmark the engine alone, beside this machine's limits.")(bench.bench)
benches.command("serve", short_help="Load-test any OpenAI-compatible server.")(bench_serve.bench_serve)


class _WithHelp(TyperGroup):
    """`manta help serve` means `manta serve --help`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)


app = typer.Typer(
    name="manta",
    cls=_WithHelp,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("serve", cls=CommandWithFlagHints)(serve.serve)
app.command("up", cls=CommandWithFlagHints)(up.up)
app.command("down")(up.down)
app.command("status", short_help="Show hosts, replicas, ranks, requests and latencies.")(status.status)
app.command("top")(status.top)
app.command("chat")(chat.chat)
app.command("batch")(batch.batch)
app.command("config")(config.config)
app.command("demo-model", short_help="Create the demo model, a small English one.")(demo_model.demo_model)
app.command("plan", short_help="Plan a model's parallel layout on given GPUs.")(plan.plan)
app.command("doctor", cls=CommandWithFlagHints)(doctor.doctor)
app.add_typer(benches, name="bench")
app.add_typer(keys.keys, name="keys", short_help="Manage a server's API keys.")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"manta {version('manta')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)]


@app.callback()
def _manta(version: Version = False) -> None:
    pass


ENVIRONMENT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE)
"""A full disk, a file system that is read-only, missing permissions, no file descriptors: reported without a stack trace."""


def forget_colorama() -> None:
    """Keep colorama from resetting the terminal's colours when the process exits, by an escape that it writes to dumb terminals too.

    Starting Ray initialises it. Nothing here leaves a colour behind: Rich ends each style where it ends.
    """
    if (colorama := sys.modules.get("colorama.initialise")) is not None:
        atexit.unregister(colorama.reset_all)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is under way is cleaned up, as at Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal cannot encode become "?"
    try:
        app()
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRNOS:
            raise
        sys.exit(f"manta: {error}")
    finally:
        forget_colorama()
