"""`manta serve`: run the server in the foreground until Ctrl-C."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from serve.commands.flags import SERVER, Given, with_flags
from serve.commands.progress import progress_shown
from serve.commands.resolve_models import find_local_models, models_for_cluster
from serve.commands.settings import Assignments, ConfigFile, exit_with_error, load_settings
from serve.logs import configure

if TYPE_CHECKING:
    from cluster.directory import ReplicaRecord
    from serve.config import ServeConfig

INTERRUPTED = 130
QUESTION = "Why is the sky blue?"
ENDING = "\nEnding what was started ..."
ANSWER_TOKENS = 200


@with_flags(*SERVER)
def serve(*, file: ConfigFile = None, given: Given, assignments: Assignments = None) -> None:
    """Serve a model over HTTP and gRPC until Ctrl-C.

    By default it starts a private Ray on this machine and stops it at the end. With --ray-address, or inside a Ray job, it
    serves on that cluster for as long as the command runs (`manta up` deploys and returns). The most common settings are flags;
    `manta config` lists all settings.

    \b
      manta serve demo --tensor-parallel 2               a small model, two ranks
      manta serve Qwen/Qwen2-0.5B-Instruct               from the Hugging Face hub
      manta serve modelscope://Qwen/Qwen2-0.5B-Instruct  from ModelScope
      manta serve s3://bucket/Qwen2-7B-Instruct -t 4     each rank reads its share
      manta serve Qwen/Qwen2-7B-Instruct --adapter ./my-lora --name my-model
      manta serve ./Qwen2-7B --speculate draft --draft-model ./Qwen2-0.5B
      manta serve ./checkpoint --http-port 8080 --dtype float32
      ray job submit --working-dir . -- python -m serve serve Qwen/Qwen2-7B
      manta serve -c manta.yaml --set engine.max_step_tokens=512
    """
    config = load_settings(file, assignments, given).config
    configure(config.logging.level, config.logging.format)
    try:
        run(config)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def run(config: "ServeConfig") -> None:
    """Find the models, start everything, and wait."""
    from serve.ray_address import LOCAL, address_of

    check_keys(config)
    _run_local(config) if address_of(config) == LOCAL else _run_on_existing_ray(config)


def _end_of_job() -> str:
    """How to stop the server. A Ray job has no terminal for Ctrl-C."""
    from serve.ray_address import JOB_VARIABLE

    return "`ray job stop` ends it." if JOB_VARIABLE in os.environ else "Ctrl-C ends it."


def check_keys(config: "ServeConfig") -> None:
    """Exit the program, before anything is started, if the key file cannot be used."""
    if config.auth.keys_file is not None:
        from serve.key_file import KeyFileError, read_keys

        try:
            read_keys(Path(config.auth.keys_file))
        except KeyFileError as error:
            exit_with_error(f"auth.keys_file: {error}")


def _check_ports(config: "ServeConfig") -> None:
    """End the command where a port is taken: before a checkpoint is fetched, which may take an hour."""
    from serve.ports import PortInUse, check_ports

    try:
        check_ports(config)
    except PortInUse as error:
        exit_with_error(str(error))


def _run_local(config: "ServeConfig") -> None:
    _check_ports(config)
    found = find_local_models(config)
    from serve.local_ray import run_local  # ray takes seconds to import: only once the models are found
    from serve.rollout import StartError

    try:
        with ExitStack() as running:
            with progress_shown() as report:
                server = running.enter_context(run_local(found, config, report))
            print_greeting(server.records(), config, [model.name for model in found])
            server.wait()
            typer.echo(ENDING)
    except StartError as error:
        exit_with_error(str(error))


def _run_on_existing_ray(config: "ServeConfig") -> None:
    """Serve on an existing cluster for as long as this command runs; `manta up` leaves the application there."""
    models = models_for_cluster(config)
    from serve.existing_ray import run_on_existing_ray
    from serve.rollout import StartError

    try:
        with ExitStack() as running:
            with progress_shown() as report:
                server = running.enter_context(run_on_existing_ray(models, config, keep=False, on_progress=report))
            print_greeting(server.records(), server.config, [model.name for model in models], last=_end_of_job())
            server.wait()
            typer.echo(ENDING)
    except StartError as error:
        exit_with_error(str(error))


def print_greeting(
    records: "Sequence[ReplicaRecord]", config: "ServeConfig", names: "Sequence[str]", *, last: str = "Ctrl-C ends it."
) -> None:
    from serve.exposure import exposure

    for line in (*loading_lines(records), *exposure(config)):
        typer.echo(line)
    typer.echo(greeting(config, names, program=program(), last=last))


def loading_lines(records: "Sequence[ReplicaRecord]") -> list[str]:
    """A line per rank: how much of the checkpoint it read, and how long that took."""
    lines = []
    for place, read in ((place, place.read) for record in records for place in record.ranks):
        if read is not None:
            along = f", {_size(read.fetched_bytes)} fetched" if read.fetched_bytes > 1.01 * read.kept_bytes else ""
            lines.append(f"rank {place.rank} on {place.host} read {_size(read.kept_bytes)} of weights in {read.seconds:.1f} s{along}")
    return lines


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def greeting(config: "ServeConfig", names: "Sequence[str]", *, program: str, last: str = "Ctrl-C ends it.") -> str:
    """Text shown once the server is ready: models, addresses and commands to paste. ``names``: model names in settings order."""
    http = f"http://{_reachable(config.http.host)}:{config.http.port}"
    grpc = f"{config.grpc.scheme}://{_reachable(config.grpc.host)}:{config.grpc.port}"
    messages = json.dumps([{"role": "user", "content": QUESTION}])
    body = f'{{"model": {json.dumps(names[0])}, "messages": {messages}}}'
    model = "" if len(names) == 1 else f"model={json.dumps(names[0])}, "
    script = f'from manta_client import Client; print(Client("{grpc}").chat.create({model}messages={messages}).text)'
    chosen = "" if len(names) == 1 else f" --model {shlex.quote(names[0])}"
    elsewhere = "" if grpc == "grpc://127.0.0.1:9000" else f" --endpoint {grpc}"
    keyed = config.auth.keys_file is not None
    header = ' -H "authorization: Bearer $MANTA_API_KEY"' if keyed else ""
    served = "\n".join(f"Manta serves {name}: {_shape(one)}" for name, one in zip(names, config.each_model(), strict=True))
    return f"""
{served}
  HTTP  {http}/v1   (OpenAI's API)
  gRPC  {grpc}

Ask it, from another terminal{_key_hint(config, program) if keyed else ""}:

  {program} chat{chosen}{elsewhere} "{QUESTION}"

  curl -s {http}/v1/chat/completions -H 'content-type: application/json'{header} -d {shlex.quote(body)}

  {_python(program)} -c {shlex.quote(script)}

{last}
"""


def _key_hint(config: "ServeConfig", program: str) -> str:
    """Where the key comes from that the commands to paste need."""
    return f", with MANTA_API_KEY set to a key (`{program} keys create --file {shlex.quote(str(config.auth.keys_file))}` makes one)"


def _shape(config: "ServeConfig") -> str:
    """Number of replicas of one model, and the ranks of each."""
    topology = config.parallel.topology
    replicas = config.replicas
    number = f"{replicas.least} to {replicas.most}" if replicas.vary else str(replicas.initial)
    copies = f"{number} replica{'' if number == '1' else 's'} of "
    return ("" if number == "1" and topology.size == 1 else copies) + (
        f"{topology.size} ranks ({topology})" if topology.size > 1 else "one rank"
    )


def _python(program: str) -> str:
    """The Python interpreter that has the client installed, written as ``program`` is: by name, relative or absolute."""
    return "python" if program == "manta" else shlex.quote(_near(sys.executable))


def _near(path: str) -> str:
    """The path, relative to the working directory if that is shorter."""
    return min(os.path.relpath(path), os.path.abspath(path), key=len)


def _reachable(host: str) -> str:
    """The address for clients on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  (compared, not bound)
    return f"[{host}]" if ":" in host else host


def program() -> str:
    """This program as one can type it in another terminal."""
    called = sys.argv[0]
    if os.path.basename(called) != "manta":
        return f"{shlex.quote(sys.executable)} -m serve"
    return "manta" if shutil.which("manta") else shlex.quote(_near(called))
