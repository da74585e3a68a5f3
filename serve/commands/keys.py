"""`manta keys`: manage the API keys of a server."""

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve.commands.settings import WRONG_USAGE, exit_with_error

if TYPE_CHECKING:
    from serve.key_file import Key

DEFAULT_FILE = "manta-keys.json"
VARIABLE = "MANTA_AUTH__KEYS_FILE"
HEADINGS = ("id", "made", "name", "scopes", "share", "quotas")

HELP = f"""Manage a server's API keys (`manta serve --set auth.keys_file=FILE`).

The file holds SHA-256 hashes only, never the keys. A running server picks up changes within a second.
FILE is --file, else ${VARIABLE}, else {DEFAULT_FILE}.

\b
  manta keys create --name alice             prints the key, once
  manta keys create --name team --requests-per-minute 600 --share 2
  manta keys create --name prometheus --scope metrics
  manta keys list
  manta keys rotate 3f81c2a90b14 --grace 1h  the old key lasts an hour more
  manta keys revoke 3f81c2a90b14
"""

keys = typer.Typer(no_args_is_help=True, help=HELP, rich_markup_mode=None)

File = Annotated[Path | None, typer.Option("--file", help="The key file.")]
Id = Annotated[str, typer.Argument(help="As `manta keys list` shows it.")]


@keys.command()
def create(
    file: File = None,
    name: Annotated[str, typer.Option("--name", help="A label: whose key it is.")] = "",
    scope: Annotated[list[str] | None, typer.Option("--scope", help="infer (the default), admin or metrics; may be repeated.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Maximum requests per minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Maximum tokens (prompt and answer) per minute.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Maximum concurrent requests.")] = None,
    share: Annotated[float, typer.Option(help="Weight of this key, relative to others, when the engine is overloaded.")] = 1.0,
) -> None:
    """Create a key and print it. It is shown only once and stored nowhere."""
    from serve.caller import Scope
    from serve.key_file import KeyFileError, locked_key_file, new_key

    path = _path(file)
    for unknown in (one for one in scope or () if one not in list(Scope)):
        exit_with_error(f"there is no scope {unknown!r}; --scope takes {', '.join(Scope)}", code=WRONG_USAGE)
    try:
        with locked_key_file(path) as write:
            present = _present(path)
            shown, key = new_key(
                name=name,
                scopes=scope or ["infer"],
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                concurrency=concurrency,
                share=share,
            )
            write((*present, key))
    except (KeyFileError, OSError) as error:
        exit_with_error(str(error))
    typer.echo(f"key {key.id} is in {path}; this is shown once:", err=True)
    typer.echo(shown)


@keys.command("list")
def list_keys(file: File = None) -> None:
    """List the keys with their ids, names, scopes and quotas."""
    from serve.key_file import KeyFileError, read_keys

    try:
        present = read_keys(_path(file))
    except KeyFileError as error:
        exit_with_error(str(error))
    from serve.terminal import Column, ColumnTable, results

    console = results()
    if console.is_terminal:
        columns = [Column(heading=name, is_text=True, is_key=name == "id", wraps=name in ("name", "quotas")) for name in HEADINGS]
        console.print(ColumnTable(columns, [cells(key) for key in present]))
    else:  # a line each, for programs
        for key in present:
            typer.echo("  ".join(cells(key)))


@keys.command()
def revoke(id: Id, file: File = None) -> None:
    """Revoke a key."""
    from serve.key_file import KeyFileError, locked_key_file

    path = _path(file)
    try:
        with locked_key_file(path) as write:
            present = _present(path)
            _find(present, id)
            write(tuple(key for key in present if key.id != id))
    except (KeyFileError, OSError) as error:
        exit_with_error(str(error))
    typer.echo(f"key {id} is revoked", err=True)


@keys.command()
def rotate(
    id: Id,
    file: File = None,
    grace: Annotated[str, typer.Option(help="How long the old key stays valid: 30s, 15m, 24h, 7d, or 0.")] = "24h",
) -> None:
    """Replace a key by a new one. Scopes, quotas and cached prefixes are kept."""
    from serve.key_file import KeyFileError, locked_key_file, rotate_key

    path, grace_s = _path(file), _seconds(grace)
    try:
        with locked_key_file(path) as write:
            present = _present(path)
            shown, key = rotate_key(_find(present, id), grace_s=grace_s)
            write(tuple(key if old.id == id else old for old in present))
    except (KeyFileError, OSError) as error:
        exit_with_error(str(error))
    typer.echo(f"key {id} has a new secret; the old one stays valid for {grace}; this is shown once:", err=True)
    typer.echo(shown)


def cells(key: "Key") -> tuple[str, ...]:
    """Cells of a row below `HEADINGS`."""
    quotas = {"requests/min": key.requests_per_minute, "tokens/min": key.tokens_per_minute, "at a time": key.concurrency}
    limits = ", ".join(f"{limit} {what}" for what, limit in quotas.items() if limit is not None) or "no quotas"
    now = time.time()
    old = sum(secret.until is not None and secret.until > now for secret in key.secrets)
    made = datetime.fromtimestamp(key.created, UTC).strftime("%Y-%m-%d")
    rotating = f"; {old} older secret still taken" if old else ""
    return key.id, made, key.name or "-", ",".join(key.scopes), f"share {key.share:g}", f"{limits}{rotating}"


def _path(file: Path | None) -> Path:
    return file or Path(os.environ.get(VARIABLE, DEFAULT_FILE))


def _present(path: Path) -> "tuple[Key, ...]":
    from serve.key_file import read_keys

    return read_keys(path) if path.exists() else ()


def _find(present: "tuple[Key, ...]", id: str) -> "Key":
    found = next((key for key in present if key.id == id), None)
    if found is None:
        exit_with_error(f"there is no key {id}; `manta keys list` shows those that are there")
    return found


def _seconds(text: str) -> float:
    number, unit = text.rstrip("smhd"), text[len(text.rstrip("smhd")) :]
    units = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
    if not number.isdecimal() or unit not in units:
        exit_with_error(f"{text!r} is not a duration; write for example 30s, 15m, 24h or 7d")
    return int(number) * units[unit]
