"""`manta doctor`: find problems on the hosts and in the checkpoint before anything is loaded, with advice for each."""

import dataclasses
import json
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from engine.counted import counted
from serve.commands.flags import ADAPTER, DRAFTING, KV_AND_CONTEXT, LAYOUT, REVISION, WEIGHTS, Given, model_flag, with_flags
from serve.commands.progress import Report, progress_shown
from serve.commands.settings import FAILED, Assignments, ConfigFile, exit_with_error, load_settings

if TYPE_CHECKING:
    from cluster.doctor.facts import HostFacts
    from cluster.doctor.findings import Finding
    from cluster.doctor.survey import Survey
    from serve.config import ServeConfig
    from serve.model_source import FoundModel

INDENT = 9
COLOURS = {"fatal": "bold red", "warning": "yellow", "note": "green"}


EXAMINED = (
    model_flag("As for `manta serve`; without it only the hosts are checked."),
    REVISION,
    ADAPTER,
    *LAYOUT,
    *WEIGHTS,
    *KV_AND_CONTEXT,
    *DRAFTING,
)


@with_flags(*EXAMINED)
def doctor(
    *,
    file: ConfigFile = None,
    given: Given,
    address: Annotated[
        str | None,
        typer.Option("--ray-address", help="Check the hosts of a running Ray cluster (auto or host:port) instead of this machine."),
    ] = None,
    checkpoint_only: Annotated[
        bool, typer.Option("--checkpoint-only", help="Only download the checkpoint if needed and check it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts and findings as JSON (a list if several models are set).")] = False,
    assignments: Assignments = None,
) -> None:
    """Check hosts, checkpoint and network before a model is loaded. Exits with 1 if something is fatal.

    For every rank's process it checks versions, GPUs, network interface, /dev/shm, disk, memory, clock and limits, and it
    measures an all-reduce between the ranks. `manta serve` runs the quick checks by itself.

    \b
      manta doctor                                  check this machine
      manta doctor Qwen/Qwen2-7B-Instruct -t 2      for this model and layout
      manta doctor /models/Qwen2-72B -t 8 --pipeline-parallel 2 --ray-address auto
      manta doctor -c manta.yaml --checkpoint-only  download every model now
    """
    config = load_settings(file, assignments, given).config
    names_a_model = given["model.source"][1] is not None or file is not None
    surveys = [_examine(one, names_a_model, address, checkpoint_only) for one in config.each_model()]
    if as_json:
        reports = [dataclasses.asdict(survey) for survey in surveys]
        typer.echo(json.dumps(reports if config.models else reports[0], indent=2))
    else:
        for survey in surveys:
            _show(survey)
    from cluster.doctor.findings import is_fatal

    if any(is_fatal(survey.findings) for survey in surveys):
        raise typer.Exit(FAILED)


def _examine(config: "ServeConfig", names_a_model: bool, address: str | None, checkpoint_only: bool) -> "Survey":
    """Check the hosts and the checkpoint for the one model of ``config``."""
    from cluster.doctor.survey import Survey

    with progress_shown() as report:
        found, findings = _checkpoint(config, report) if names_a_model or checkpoint_only else (None, [])
        if checkpoint_only:
            return Survey(facts=(), findings=tuple(findings))
        report("examining the hosts", 0.5)
        return _survey(config, found, address).with_findings(findings)


def _checkpoint(config: "ServeConfig", report: Report) -> "tuple[FoundModel | None, list[Finding]]":
    from cluster.doctor.findings import Finding, Severity
    from serve.model_check import UnusableCheckpoint, adapter_base_warning, check_model, context_warning, with_local_draft_model
    from serve.model_source import ModelSourceError, find_model

    try:
        found = find_model(config.model, report)
        report("checking the checkpoint", 0.3)
        check_model(found.location, config.parallel.topology, found.adapter, max_context_tokens=config.runner.max_context_tokens)
        with_local_draft_model(config, found.location, report)
    except (ModelSourceError, UnusableCheckpoint) as error:
        return None, [Finding(severity=Severity.FATAL, check="checkpoint", host=None, found=str(error))]
    findings = [Finding(severity=Severity.NOTE, check="checkpoint", host=None, found=f"{found.location} is whole and fits its config.json")]
    if cut := context_warning(found.location):
        findings.append(Finding(severity=Severity.WARNING, check="context", host=None, found=cut))
    if found.adapter is not None:
        fits = Finding(severity=Severity.NOTE, check="adapter", host=None, found=f"{found.adapter} is whole and fits the checkpoint")
        doubt = adapter_base_warning(found.adapter, config.model.source)
        findings.append(Finding(severity=Severity.WARNING, check="adapter", host=None, found=doubt) if doubt else fits)
    return found, findings


def _survey(config: "ServeConfig", found: "FoundModel | None", address: str | None) -> "Survey":
    from cluster.doctor.gather import gpus_here
    from parallel.user_cache import cache_folder
    from serve.devices import DeviceError, assign_devices
    from serve.host_requirements import host_requirements

    folder, adapter, topology = found.folder if found else None, found.adapter if found else None, config.parallel.topology
    try:
        if address is None:
            from cluster.doctor.survey import survey_this_machine

            (config,) = assign_devices([config], [{"GPU": len(gpus_here())}])
            return survey_this_machine(topology, host_requirements(folder, config, adapter), cache_folder=cache_folder(), host_check=None)
        from cluster.doctor.cluster_survey import survey_cluster
        from cluster.ray_cluster import CannotJoin, host_resources, join_ray_cluster
        from cluster.worker import ModelRankLauncher

        try:
            with (
                redirect_stdout(sys.stderr),
                join_ray_cluster(address, namespace=config.ray.namespace),
            ):  # Ray reports lost hosts on stdout
                (config,) = assign_devices([config], host_resources())
                need = host_requirements(folder, config, adapter)
                launcher = found and ModelRankLauncher(
                    checkpoint_folder=found.location,
                    topology=topology,
                    runner_config=config.runner,
                    engine_config=config.engine,
                    adapter=found.adapter,
                    need=need,
                )
                return survey_cluster(topology, config.resources, need, host_check=launcher.check_host if launcher else None)
        except CannotJoin as error:
            exit_with_error(str(error))
    except DeviceError as error:
        exit_with_error(str(error))


def _show(survey: "Survey") -> None:
    from rich.text import Text

    from serve.terminal import results, wrapped

    console = results()
    for each in survey.facts:
        console.print(Text("\n".join(wrapped(_line(each), console.width))), soft_wrap=True)
    for finding in survey.findings:
        text = Text("\n".join(paragraph(finding, console.width)))
        text.stylize(COLOURS[finding.severity], 0, len(finding.severity))
        console.print(text, soft_wrap=True)
    if all(finding.severity == "note" for finding in survey.findings):
        console.print("no problems found")


def paragraph(finding: "Finding", width: int) -> list[str]:
    """The severity, beside it the finding and below that the advice, wrapped to ``width`` columns."""
    from serve.terminal import wrapped

    where = f" on {finding.host}" if finding.host else ""
    sentences = [f"{finding.check}{where}: {finding.found}", *([f"-> {finding.todo}"] if finding.todo else [])]
    lines = [line for sentence in sentences for line in wrapped(sentence, width - INDENT, then="   " if sentence.startswith("-> ") else "")]
    margins = [finding.severity, *[""] * (len(lines) - 1)]
    return [f"{margin:<{INDENT}}{line}" for margin, line in zip(margins, lines, strict=True)]


def _line(facts: "HostFacts") -> str:
    """One line about a rank's process."""
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    gpus = f", {len(facts.gpus)} GPU ({facts.gpus[0].name})" if facts.gpus else ""
    return (
        f"rank {facts.rank} on {facts.host}: {counted(facts.cores, 'core')}{gpus}, "
        f"{facts.memory_available_bytes / 2**30:.1f} GiB of memory free, {facts.shm_free_bytes / 2**30:.1f} GiB of shared memory, "
        f"{facts.cache_folder} {facts.cache_free_bytes / 2**30:.1f} GiB free; "
        f"Python {facts.python}, {versions}" + (f", driver {facts.driver}" if facts.driver else "")
    )
