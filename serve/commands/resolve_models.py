"""Find the models that the settings name and check them as far as seconds allow, so that mistakes show before Ray starts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from serve.commands.progress import progress_shown
from serve.commands.settings import exit_with_error

if TYPE_CHECKING:
    from serve.config import ServeConfig
    from serve.deployment import ServedModel


def find_local_models(config: "ServeConfig") -> "list[ServedModel]":
    """The models on this machine, downloaded if needed. Exits the program if one cannot be served."""
    from serve.model_source import FoundModel, ModelSourceError, find_model

    def find(one: "ServeConfig") -> FoundModel:
        with progress_shown() as report:
            try:
                found = find_model(one.model, report)
            except ModelSourceError as error:
                exit_with_error(str(error))
            report("checking the checkpoint", 0.0)
            _check(found.location, found.adapter, one)
            return found

    def with_draft_model(location: Path | str, one: "ServeConfig") -> "ServeConfig":
        from serve.model_check import UnusableCheckpoint, with_local_draft_model

        with progress_shown() as report:
            try:
                return with_local_draft_model(one, location, report)
            except UnusableCheckpoint as error:
                exit_with_error(str(error))

    each = config.each_model()
    found = [find(one) for one in each]
    each = tuple(with_draft_model(model.location, one) for model, one in zip(found, each, strict=True))
    return _models([(model.location, model.adapter, model.name) for model in found], each)


def models_for_cluster(config: "ServeConfig") -> "list[ServedModel]":
    """The models by locations that are valid on every host of a cluster; models of a hub are downloaded there, not here.

    Exits the program if one cannot be served.
    """
    from serve.model_source import ModelSourceError, portable_adapter, portable_source, served_name

    each = [_absolute(one) for one in config.each_model()]
    try:
        found = [(portable_source(one.model), portable_adapter(one.model), served_name(one.model)) for one in each]
        drafts = [_portable_draft(one) for one in each]
    except ModelSourceError as error:
        exit_with_error(str(error))
    with progress_shown() as report:
        for (location, adapter, _), draft, one in zip(found, drafts, each, strict=True):
            if _is_seen_from_here(location):
                report("checking the checkpoint", 0.0)
                _check(location, adapter if adapter is not None and _is_seen_from_here(adapter) else None, one)
                if draft is not None and _is_seen_from_here(draft):
                    _check_draft(location, draft)
    return _models(found, [_with_draft_model(one, draft) for draft, one in zip(drafts, each, strict=True)])


def _portable_draft(config: "ServeConfig") -> Path | str | None:
    from serve.config import ModelSettings
    from serve.model_source import absolute_if_local, portable_source

    source = config.runner.draft_model
    return None if source is None else portable_source(ModelSettings(source=absolute_if_local(source)))


def _is_seen_from_here(location: Path | str) -> bool:
    """Whether it can be checked here: a folder may exist on the other hosts only, and hub models are downloaded there."""
    from serve.model_source import needs_download

    return not needs_download(location) and ("://" in str(location) or Path(location).is_dir())


def _with_draft_model(config: "ServeConfig", location: Path | str | None) -> "ServeConfig":
    if location is None:
        return config
    return config.model_copy(update={"runner": replace(config.runner, draft_model=str(location))})


def _absolute(config: "ServeConfig") -> "ServeConfig":
    """Resolve relative folders that exist on this host."""
    from serve.model_source import absolute_if_local

    here = {"source": absolute_if_local(config.model.source), "adapter": config.model.adapter and absolute_if_local(config.model.adapter)}
    return config.model_copy(update={"model": config.model.model_copy(update=here)})


def _check(location: Path | str, adapter: Path | str | None, config: "ServeConfig") -> None:
    from serve.model_check import (  # torch takes seconds to import
        UnusableCheckpoint,
        adapter_base_warning,
        check_model,
        context_warning,
    )

    try:
        check_model(location, config.parallel.topology, adapter, max_context_tokens=config.runner.max_context_tokens)
        if cut := context_warning(location):
            typer.echo(f"manta: {cut}", err=True)
        if adapter is not None and (doubt := adapter_base_warning(adapter, config.model.source)):
            typer.echo(f"manta: {doubt}", err=True)
    except UnusableCheckpoint as error:
        exit_with_error(str(error))


def _check_draft(location: Path | str, draft: Path | str) -> None:
    from serve.model_check import UnusableCheckpoint, check_draft

    try:
        check_draft(location, draft)
    except UnusableCheckpoint as error:
        exit_with_error(f"runner.draft_model: {error}")


def _models(found: "Sequence[tuple[Path | str, Path | str | None, str]]", each: "Sequence[ServeConfig]") -> "list[ServedModel]":
    from serve.model_source import ModelSourceError, check_unique_names

    try:
        check_unique_names([name for _, _, name in found])
    except ModelSourceError as error:
        exit_with_error(str(error))
    from serve.deployment import ServedModel  # ray

    return [
        ServedModel(location=location, adapter=adapter, name=name, config=one)
        for (location, adapter, name), one in zip(found, each, strict=True)
    ]
