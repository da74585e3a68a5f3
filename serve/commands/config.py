"""`manta config`: what is set, what it means, and where it came from."""

import json
from typing import Annotated

import typer

from serve.commands.settings import WRONG_USAGE, Assignments, ConfigFile, load_settings, stop


def config(
    file: ConfigFile = None,
    assignments: Assignments = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a settings file instead, for editors.")] = False,
    explain: Annotated[str | None, typer.Option("--explain", metavar="SECTION.FIELD", help="Explain one setting instead.")] = None,
) -> None:
    """Print the settings in effect as a commented YAML file.

    Settings come from a file (-c), then the environment, then flags; later ones win.

    \b
      manta config > manta.yaml                       a file to begin with
      manta config -c manta.yaml                      check a file; says where each value came from
      manta config --explain engine.max_step_tokens   one setting: meaning, default, how to set it
      MANTA_HTTP__PORT=8080 manta config              the environment: MANTA_<SECTION>__<FIELD>
    """
    from serve import config_docs
    from serve.config_sources import ConfigError

    if schema:
        return typer.echo(json.dumps(config_docs.json_schema(), indent=2))
    loaded = load_settings(file, assignments, {})
    if explain is None:
        return typer.echo(config_docs.as_yaml(loaded), nl=False)
    try:
        typer.echo(config_docs.explain(explain, loaded))
    except ConfigError as error:
        stop(str(error), code=WRONG_USAGE)
