"""`manta status` and `manta top`: what runs where and how busy it is, once or live."""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from serve.commands.flags import RAY_ADDRESS, Given, with_flags
from serve.commands.settings import Assignments, ConfigFile, exit_with_error, load_settings

if TYPE_CHECKING:
    from serve.config import ServeConfig
    from serve.local_servers import LocalServerRecord
    from serve.overview import Overview

EVERY_S = 1.0


@with_flags(RAY_ADDRESS)
def status(
    *,
    file: ConfigFile = None,
    given: Given,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show hosts, replicas and ranks, KV use, requests and latencies.

    Of the cluster at --ray-address or RAY_ADDRESS; without either, of the server that `manta serve` runs on this machine, or of the
    Ray cluster that this host belongs to.
    Lost or unreachable hosts and processes are listed, not waited for. Exits with 1 if anything that should serve is not ready or missing.
    """
    with redirect_stdout(sys.stderr), _watching(load_settings(file, assignments, given).config):  # Ray reports lost hosts on stdout
        from serve.overview import collect_overview

        seen = collect_overview()
    if as_json:
        typer.echo(json.dumps(_tree(seen), indent=2, default=str))
    else:
        from serve.overview_table import tables
        from serve.terminal import results

        results().print(tables(seen, None))
    if not seen.complete:
        raise typer.Exit(1)


@with_flags(RAY_ADDRESS)
def top(
    *,
    file: ConfigFile = None,
    given: Given,
    assignments: Assignments = None,
    every_s: Annotated[float, typer.Option("--every", min=0.2, help="Seconds between updates.")] = EVERY_S,
) -> None:
    """Like `manta status`, live. Rates and latencies cover the last ten seconds. Ctrl-C ends it."""
    with _watching(load_settings(file, assignments, given).config):
        from rich.live import Live

        from serve.overview import collect_overview
        from serve.overview_table import Window, tables
        from serve.terminal import results

        window, console = Window(), results()
        redraws = console.is_terminal and not console.is_dumb_terminal
        try:
            with Live(console=console, screen=True, auto_refresh=False) if redraws else nullcontext() as live:
                while True:
                    seen = collect_overview()
                    window.add(time.monotonic(), seen)
                    if live is None:
                        console.print(tables(seen, window), "")
                        console.file.flush()
                    else:
                        live.update(tables(seen, window), refresh=True)
                    time.sleep(every_s)
        except KeyboardInterrupt:
            return


@contextmanager
def _watching(config: "ServeConfig") -> Iterator[None]:
    """Connect to the cluster that is meant. Exits the program if there is none."""
    from serve.ray_address import watched_address

    address, server = _meant(watched_address(config))
    if server is not None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": server.token}
    from cluster.ray_cluster import CannotJoin, join_ray_cluster  # imports ray, which reads those variables when it is imported

    try:
        with join_ray_cluster(address, namespace=config.ray.namespace):
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own handler prints a stack trace
            yield
    except CannotJoin as error:
        if watched_address(config) is None and "Could not find any running Ray" in str(error):
            exit_with_error(
                "no `manta serve` of yours and no Ray cluster runs on this machine; --ray-address HOST:PORT names one elsewhere"
            )
        exit_with_error(
            f"{error}\nno `manta serve` of yours runs on this machine either" if watched_address(config) is None else str(error)
        )


def _meant(address: str | None) -> "tuple[str, LocalServerRecord | None]":
    """The Ray to join, and the server of this user that it belongs to. Exits the program if there is none, or more than one to choose from.

    ``address``: see `watched_address`.
    """
    from serve.local_servers import running_servers

    servers = running_servers()
    if address not in (None, "local"):
        return address, next((each for each in servers if each.address == address), None)
    starting, servers = [each for each in servers if not each.address], [each for each in servers if each.address]
    if starting and not servers:
        exit_with_error(f"the server at {starting[0].http} (pid {starting[0].pid}) is starting its Ray; try again in a few seconds")
    if len(servers) > 1:
        listed = "\n".join(f"  --ray-address {each.address}  {each.http}" for each in servers)
        exit_with_error(f"{len(servers)} servers run here; choose one:\n{listed}")
    if servers:
        return servers[0].address, servers[0]
    if address == "local":
        exit_with_error("no `manta serve` of yours runs on this machine")
    return "auto", None


def _tree(seen: "Overview") -> dict[str, object]:
    from serve.overview_table import wait_figures

    return {
        "http": seen.http,
        "hosts": [dataclasses.asdict(host) for host in seen.hosts],
        "applications": [dataclasses.asdict(app) for app in seen.apps],
        "fronts": [{"application": app, "id": front.id, "state": front.state} for app, front in seen.fronts],
        "replicas": [
            {
                "application": app,
                **{name: value for name, value in dataclasses.asdict(record).items() if name not in ("guest_keys", "address")},
            }
            for app, record in seen.replicas
        ],
        "missing": seen.missing,
        "waits": [
            {"application": app, "model": model, **wait_figures(waits.first_token, waits.next_token)}
            for (app, model), waits in seen.waits.items()
        ],
    }
