"""Everything of a checkpoint that can be found wrong without reading a weight: seconds, before Ray is even started."""

from pathlib import Path

from engine.run.draft_fit import check_draft_model
from model.checkpoint import Checkpoint
from model.checkpoint_folder import small_files
from model.config import ModelConfig
from model.load import check_checkpoint
from parallel.fitting import check_fit
from parallel.topology import Topology
from serve.model_facts import ModelFacts
from serve.text.tokenizer import Tokenizer


class UnusableCheckpoint(ValueError):
    """What is wrong with a checkpoint; the message names the file, and the tensor where it is about one."""


def check_model(place: Path | str, topology: Topology) -> None:
    """Configuration, tokenizer, and the headers of all weights, each by itself and against the others, and whether the model
    can be laid out so.

    Raises:
        UnusableCheckpoint: the model cannot be served.
    """
    try:
        folder = small_files(place)
        config = ModelConfig.from_checkpoint(folder)
        check_fit(topology, config)
        with Checkpoint(place) as checkpoint:
            check_checkpoint(checkpoint, config)
        ModelFacts.from_checkpoint(folder, name="", tokenizer=Tokenizer.from_folder(folder))
    except ValueError as error:  # LayoutMisfit, CheckpointError and -Mismatch, InvalidModelConfig, UnsupportedModel, InvalidTokenizer
        raise UnusableCheckpoint(str(error)) from error


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
