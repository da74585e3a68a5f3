"""Check a checkpoint without reading weights: takes seconds, and runs before Ray starts."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from engine.run.draft_compatibility import check_draft_model
from model.adapter import Adapter
from model.adapter_config import AdapterConfig
from model.adapter_files import files_with_adapter
from model.checkpoint import Checkpoint
from model.checkpoint_folder import is_remote, small_files
from model.config import ModelConfig
from model.load import check_checkpoint
from model.terminal_safe import terminal_safe
from parallel.layout_check import check_layout
from parallel.topology import Topology
from serve.config import ModelSettings, ServeConfig
from serve.model_facts import ModelFacts
from serve.model_source import DEMO, ModelSourceError, Report, find_model
from serve.text.chat_template import ChatTemplate
from serve.text.tokenizer import Tokenizer


class UnusableCheckpoint(ValueError):
    """A checkpoint cannot be served; the message names the file, and the tensor if one is at fault."""


def check_model(
    location: Path | str, topology: Topology, adapter: Path | str | None = None, *, max_context_tokens: int | None = None
) -> None:
    """Check configuration, tokenizer, chat template and the headers of all weight files, each by itself and for consistency, and that the
    model supports this topology and context length. The weights of an adapter on this host are checked fully.

    Raises:
        UnusableCheckpoint: the model cannot be served.
    """
    try:
        folder = files_with_adapter(small_files(location), None if adapter is None else small_files(adapter))
        config = ModelConfig.from_checkpoint(folder)
        check_layout(topology, config)
        config.context_limit(max_context_tokens)
        with Checkpoint(location) as checkpoint, nullcontext() if adapter is None else Adapter(adapter) as opened:
            check_checkpoint(checkpoint, config, adapter=opened)
            if opened is not None and not is_remote(opened.location):
                opened.check_numbers()
        tokenizer = Tokenizer.from_folder(folder)
        ChatTemplate.from_folder(folder, tokenizer)
        ModelFacts.from_checkpoint(folder, name="", tokenizer=tokenizer)
    except ValueError as error:  # InvalidLayout, ContextTooLong, CheckpointError and -Mismatch, AdapterError, InvalidModelConfig, ...
        raise UnusableCheckpoint(str(error)) from error


def context_warning(location: Path | str) -> str | None:
    """Warning if the model is served with a shorter context than its files state, else None."""
    config = ModelConfig.from_checkpoint(small_files(location))
    if config.dual_chunk_tokens is None:
        return None
    return (
        f"{location} supports {config.max_context_tokens} tokens here, not {config.dual_chunk_tokens}: longer contexts need dual chunk "
        "attention, which is not supported"
    )


def adapter_base_warning(adapter: Path | str, base: str) -> str | None:
    """Warning if the adapter's files name another base model than ``base``, else None."""
    config = AdapterConfig.from_folder(small_files(adapter))
    if base == DEMO or config.base is None or config.is_of(base):
        return None
    return f"the adapter {adapter} says that it was trained on {terminal_safe(config.base)}, but is merged into {base}"


def with_local_draft_model(config: ServeConfig, location: Path | str, report: Report = lambda _doing, _done: None) -> ServeConfig:
    """The settings with the draft model, if any, resolved to a location on this machine and checked against the model at ``location``.

    Raises:
        UnusableCheckpoint: the draft model cannot be found or used.
    """
    source = config.runner.draft_model
    if source is None:
        return config
    report("checking the draft model", 0.5)
    try:
        draft = find_model(ModelSettings(source=source), report).location
        check_draft(location, draft)
    except (ModelSourceError, UnusableCheckpoint) as error:
        raise UnusableCheckpoint(f"runner.draft_model: {error}") from error
    return config.model_copy(update={"runner": replace(config.runner, draft_model=str(draft))})


def check_draft(location: Path | str, draft: Path | str) -> None:
    """Check that the model at ``draft`` can be read and can serve as draft model for the one at ``location``.

    Raises:
        UnusableCheckpoint: it cannot.
    """
    try:
        config = ModelConfig.from_checkpoint(small_files(draft))
        with Checkpoint(draft) as checkpoint:
            check_checkpoint(checkpoint, config)
        check_draft_model(location, draft)
    except ValueError as error:
        raise UnusableCheckpoint(str(error)) from error
