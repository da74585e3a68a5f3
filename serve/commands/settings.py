"""Options that several commands share, and how command-line flags become settings."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from serve.config_sources import LoadedConfig

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML settings file; `manta config` prints one.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Set any setting; may be repeated."),
]

WRONG_USAGE = 2
FAILED = 1


def load_settings(file: Path | None, assignments: list[str] | None, flags: Mapping[str, tuple[str, object]]) -> "LoadedConfig":
    """Load settings from the file, the environment, then flags. ``flags``: setting path to (flag name, value; None if not given).

    Exits the program with a line per problem if settings are wrong.
    """
    from serve.config_sources import ConfigError, Entry, from_assignment, load

    given = [Entry(path, value, flag) for path, (flag, value) in flags.items() if value is not None]
    try:
        return load(file=file, environment=os.environ, flags=[*(from_assignment(text) for text in assignments or ()), *given])
    except ConfigError as error:
        exit_with_error(str(error), code=WRONG_USAGE)


def exit_with_error(message: str, *, code: int = FAILED) -> NoReturn:
    """Print the message to stderr and exit with ``code``."""
    for line in message.splitlines():
        typer.echo(f"manta: {line}", err=True)
    raise typer.Exit(code)


def exit_if_no_key(key: str) -> None:
    """Exit the program if no request can carry the API key: the HTTP libraries refuse it as a header, each in its own words."""
    from manta_client.endpoint import check_key
    from manta_client.errors import InvalidKey

    try:
        check_key(key)
    except InvalidKey as error:
        exit_with_error(str(error), code=WRONG_USAGE)
