"""`manta up` and `manta down`: deploy an application on an existing Ray cluster, and remove it."""

from typing import TYPE_CHECKING

import typer

from serve.commands.flags import APP, RAY_ADDRESS, SERVER, Given, with_flags
from serve.commands.progress import progress_shown
from serve.commands.resolve_models import models_for_cluster
from serve.commands.serve import print_greeting, program
from serve.commands.settings import Assignments, ConfigFile, exit_with_error, load_settings
from serve.logs import configure

if TYPE_CHECKING:
    from serve.config import ServeConfig


@with_flags(*SERVER, APP)
def up(*, file: ConfigFile = None, given: Given, assignments: Assignments = None) -> None:
    """Deploy on an existing Ray cluster, and return.

    Run it again with other settings to update the deployment in place: replica by replica, without a second set of GPUs. If new
    replicas fail to start, the remaining old ones keep serving. The cluster's token is read as Ray reads it: RAY_AUTH_MODE=token
    and RAY_AUTH_TOKEN_PATH.

    \b
      manta up Qwen/Qwen2-7B-Instruct -t 2 -r 4       on this host's Ray cluster
      manta up -c manta.yaml --ray-address head:6379
      manta status                                    see what runs where
      manta down                                      remove it
    """
    config = on_a_cluster(load_settings(file, assignments, given).config)
    configure(config.logging.level, config.logging.format)
    models = models_for_cluster(config)
    from serve.existing_ray import run_on_existing_ray
    from serve.rollout import StartError

    try:
        with progress_shown() as report, run_on_existing_ray(models, config, keep=True, on_progress=report) as server:
            records, served = server.records(), server.config
    except StartError as error:
        exit_with_error(str(error))
    print_greeting(records, served, [model.name for model in models], last=f"{program()} down ends it.")


@with_flags(RAY_ADDRESS, APP)
def down(*, file: ConfigFile = None, given: Given, assignments: Assignments = None) -> None:
    """Remove what `manta up` deployed. Running requests get the deployed `replica.drain_timeout_s` to finish; Ctrl-C ends them at once."""
    config = on_a_cluster(load_settings(file, assignments, given).config)
    from cluster.ray_cluster import CannotJoin, join_ray_cluster
    from serve.existing_ray import remove
    from serve.stop_signals import StopSignals

    stop = StopSignals()
    stop.starting = False
    stop.stopped.set()  # the command itself stops the application: Ctrl-C is a repetition
    try:
        with join_ray_cluster(str(config.ray.address), namespace=config.ray.namespace):
            removed = remove(config.ray.app, stop=stop)
    except CannotJoin as error:
        exit_with_error(str(error))
    if not removed:
        exit_with_error(f"the cluster has no application {config.ray.app!r}; `{program()} status` lists them")
    typer.echo(f"{config.ray.app} has ended")


def on_a_cluster(config: "ServeConfig") -> "ServeConfig":
    """The settings with the address of an existing cluster: that of this host if none is given."""
    if config.ray.address == "local":
        exit_with_error('ray.address is "local": use auto or host:port, or run `manta serve`')
    return config.model_copy(update={"ray": config.ray.model_copy(update={"address": config.ray.address or "auto"})})
