"""Flags that several commands share, and how flags become settings."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from serve.config_sources import LoadedConfig

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings; `manta config` prints one.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Any setting; may be given again."),
]

WRONG_USAGE = 2
FAILED = 1


def load_settings(file: Path | None, assignments: list[str] | None, flags: Mapping[str, tuple[str, object]]) -> "LoadedConfig":
    """File, environment, then flags. ``flags``: path of the setting to (flag as written, value or None for not given).

    Leaves the program with a line per problem if settings are wrong.
    """
    from serve.config_sources import ConfigError, Entry, from_assignment, load

    given = [Entry(path, value, flag) for path, (flag, value) in flags.items() if value is not None]
    try:
        return load(file=file, environment=os.environ, flags=[*(from_assignment(text) for text in assignments or ()), *given])
    except ConfigError as error:
        exit_with_error(str(error), code=WRONG_USAGE)


def exit_with_error(message: str, *, code: int = FAILED) -> NoReturn:
    """Say why on stderr and leave."""
    for line in message.splitlines():
        typer.echo(f"manta: {line}", err=True)
    raise typer.Exit(code)
