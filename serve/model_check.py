"""Everything of a checkpoint that can be found wrong without reading a weight: seconds, before Ray is even started."""

from dataclasses import replace
from pathlib import Path

from engine.run.draft_fit import check_draft_model
from model.checkpoint import Checkpoint
from model.checkpoint_folder import small_files
from model.config import ModelConfig
from model.load import check_checkpoint
from parallel.fitting import check_fit
from parallel.topology import Topology
from serve.config import ModelSettings, ServeConfig
from serve.model_facts import ModelFacts
from serve.model_source import ModelSourceError, Report, find_model
from serve.text.tokenizer import Tokenizer


class UnusableCheckpoint(ValueError):
    """What is wrong with a checkpoint; the message names the file, and the tensor where it is about one."""


def check_model(place: Path | str, topology: Topology, *, max_context_tokens: int | None = None) -> None:
    """Configuration, tokenizer, and the headers of all weights, each by itself and against the others, and whether the model
    can be laid out so and takes sequences so long.

    Raises:
        UnusableCheckpoint: the model cannot be served.
    """
    try:
        folder = small_files(place)
        config = ModelConfig.from_checkpoint(folder)
        check_fit(topology, config)
        config.context_limit(max_context_tokens)
        with Checkpoint(place) as checkpoint:
            check_checkpoint(checkpoint, config)
        ModelFacts.from_checkpoint(folder, name="", tokenizer=Tokenizer.from_folder(folder))
    except (
        ValueError
    ) as error:  # LayoutMisfit, ContextTooLong, CheckpointError and -Mismatch, InvalidModelConfig, UnsupportedModel, InvalidTokenizer
        raise UnusableCheckpoint(str(error)) from error


def with_draft_model_here(config: ServeConfig, place: Path | str, report: Report = lambda _doing, _done: None) -> ServeConfig:
    """The settings with their draft model, if they name one, found on this machine and looked over beside the model at ``place``.

    Raises:
        UnusableCheckpoint: it is not to be found, or of no use.
    """
    source = config.runner.draft_model
    if source is None:
        return config
    report("checking the draft model", 0.5)
    try:
        draft = find_model(ModelSettings(source=source), report).place
        check_draft(place, draft)
    except (ModelSourceError, UnusableCheckpoint) as error:
        raise UnusableCheckpoint(f"runner.draft_model: {error}") from error
    return config.model_copy(update={"runner": replace(config.runner, draft_model=str(draft))})


def check_draft(place: Path | str, draft: Path | str) -> None:
    """Whether the model at ``draft`` can be read, and guess for the one at ``place``.

    Raises:
        UnusableCheckpoint: it cannot.
    """
    try:
        config = ModelConfig.from_checkpoint(small_files(draft))
        with Checkpoint(draft) as checkpoint:
            check_checkpoint(checkpoint, config)
        check_draft_model(place, draft)
    except ValueError as error:
        raise UnusableCheckpoint(str(error)) from error
