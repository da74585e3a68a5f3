"""`manta config`: print the settings, what they mean and where each value came from."""

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from serve.commands.settings import WRONG_USAGE, Assignments, ConfigFile, exit_with_error, load_settings

if TYPE_CHECKING:
    from serve.config_sources import LoadedConfig


def config(
    file: ConfigFile = None,
    assignments: Assignments = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a settings file (for editors).")] = False,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="SECTION[.FIELD]", help="Explain one setting, or list one section.")
    ] = None,
    emit: Annotated[
        Literal["manta", "serve"], typer.Option("--emit", help="Format: a settings file, or a Ray Serve config file for `serve deploy`.")
    ] = "manta",
    name: Annotated[str, typer.Option("--name", help="Application name in the Ray Serve config file.")] = "manta",
) -> None:
    """Print the settings in effect as a commented YAML file.

    Settings are read from a file (-c), then the environment, then flags; later sources override earlier ones.

    \b
      manta config > manta.yaml                      write a file to start from
      manta config -c manta.yaml                     check it, show each origin
      manta config --explain engine.max_step_tokens  meaning, how to set it
      manta config -c manta.yaml --emit serve        for Ray Serve, RayService
      MANTA_HTTP__PORT=8080 manta config             MANTA_<SECTION>__<FIELD>
    """
    from serve import config_docs
    from serve.config_sources import ConfigError
    from serve.terminal import results

    if schema:
        return typer.echo(json.dumps(config_docs.json_schema(), indent=2))
    loaded = load_settings(file, assignments, {})
    if emit == "serve":
        return _emit_serve(loaded, name)
    if explain is None:
        return typer.echo(config_docs.as_yaml(loaded, width=min(results().width, config_docs.WIDTH)), nl=False)
    try:
        typer.echo(config_docs.explain(explain, loaded, width=results().width))
    except ConfigError as error:
        exit_with_error(str(error), code=WRONG_USAGE)


def _emit_serve(loaded: "LoadedConfig", name: str) -> None:
    from serve.model_source import ModelSourceError, portable_adapter, portable_source
    from serve.ray_serve_config import ray_serve_config_yaml

    try:
        for each in loaded.config.each_model():
            portable_source(each.model)
            portable_adapter(each.model)
    except ModelSourceError as error:
        exit_with_error(str(error), code=WRONG_USAGE)
    typer.echo(ray_serve_config_yaml(loaded, name=name), nl=False)
