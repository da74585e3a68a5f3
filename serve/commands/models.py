"""The models that settings name, looked over as far as that takes seconds: whoever errs shall not wait for Ray to hear of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from serve.commands.progress import progress_shown
from serve.commands.settings import stop

if TYPE_CHECKING:
    from serve.config import ServeConfig
    from serve.deployment import Model


def found_here(config: "ServeConfig") -> "list[Model]":
    """On this machine, fetched if need be. Leaves the program where one cannot be served."""
    from serve.model_source import FoundModel, ModelSourceError, find_model

    def find(one: "ServeConfig") -> FoundModel:
        with progress_shown() as report:
            try:
                found = find_model(one.model, report)
            except ModelSourceError as error:
                stop(str(error))
            report("checking the checkpoint", 0.0)
            _check(found.place, found.adapter, one)
            return found

    def with_draft_model(place: Path | str, one: "ServeConfig") -> "ServeConfig":
        from serve.model_check import UnusableCheckpoint, with_draft_model_here

        with progress_shown() as report:
            try:
                return with_draft_model_here(one, place, report)
            except UnusableCheckpoint as error:
                stop(str(error))

    each = config.each_model()
    found = [find(one) for one in each]
    each = tuple(with_draft_model(model.place, one) for model, one in zip(found, each, strict=True))
    return _models([(model.place, model.adapter, model.name) for model in found], each)


def meant_on_every_host(config: "ServeConfig") -> "list[Model]":
    """In a form that every host of a cluster understands; a hub's are fetched there, and not here."""
    from serve.model_source import ModelSourceError, adapter_on_any_host, called, place_on_any_host

    each = [_absolute(one) for one in config.each_model()]
    try:
        found = [(place_on_any_host(one.model), adapter_on_any_host(one.model), called(one.model)) for one in each]
        drafts = [_draft_on_any_host(one) for one in each]
    except ModelSourceError as error:
        stop(str(error))
    with progress_shown() as report:
        for (place, adapter, _), draft, one in zip(found, drafts, each, strict=True):
            if _is_seen_from_here(place):
                report("checking the checkpoint", 0.0)
                _check(place, adapter if adapter is not None and _is_seen_from_here(adapter) else None, one)
                if draft is not None and _is_seen_from_here(draft):
                    _check_draft(place, draft)
    return _models(found, [_with_draft_model(one, draft) for draft, one in zip(drafts, each, strict=True)])


def _draft_on_any_host(config: "ServeConfig") -> Path | str | None:
    from serve.config import ModelSettings
    from serve.model_source import absolute_if_here, place_on_any_host

    source = config.runner.draft_model
    return None if source is None else place_on_any_host(ModelSettings(source=absolute_if_here(source)))


def _is_seen_from_here(place: Path | str) -> bool:
    """A folder may be there on the other hosts alone, and what is fetched is fetched there."""
    from serve.model_source import is_fetched

    return not is_fetched(place) and ("://" in str(place) or Path(place).is_dir())


def _with_draft_model(config: "ServeConfig", place: Path | str | None) -> "ServeConfig":
    if place is None:
        return config
    return config.model_copy(update={"runner": replace(config.runner, draft_model=str(place))})


def _absolute(config: "ServeConfig") -> "ServeConfig":
    """A relative folder that is there is meant as seen from here."""
    from serve.model_source import absolute_if_here

    here = {"source": absolute_if_here(config.model.source), "adapter": config.model.adapter and absolute_if_here(config.model.adapter)}
    return config.model_copy(update={"model": config.model.model_copy(update=here)})


def _check(place: Path | str, adapter: Path | str | None, config: "ServeConfig") -> None:
    from serve.model_check import UnusableCheckpoint, check_model, cut_of, doubt_about  # torch: seconds that a wrong name need not cost

    try:
        check_model(place, config.parallel.topology, adapter, max_context_tokens=config.runner.max_context_tokens)
        if cut := cut_of(place):
            typer.echo(f"manta: {cut}", err=True)
        if adapter is not None and (doubt := doubt_about(adapter, config.model.source)):
            typer.echo(f"manta: {doubt}", err=True)
    except UnusableCheckpoint as error:
        stop(str(error))


def _check_draft(place: Path | str, draft: Path | str) -> None:
    from serve.model_check import UnusableCheckpoint, check_draft

    try:
        check_draft(place, draft)
    except UnusableCheckpoint as error:
        stop(f"runner.draft_model: {error}")


def _models(found: "Sequence[tuple[Path | str, Path | str | None, str]]", each: "Sequence[ServeConfig]") -> "list[Model]":
    from serve.model_source import ModelSourceError, must_have_own_names

    try:
        must_have_own_names([name for _, _, name in found])
    except ModelSourceError as error:
        stop(str(error))
    from serve.deployment import Model  # ray

    return [Model(place=place, adapter=adapter, name=name, config=one) for (place, adapter, name), one in zip(found, each, strict=True)]
