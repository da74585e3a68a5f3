"""Checks that a draft model fits a model: token ids must mean the same to both."""

from pathlib import Path

from model.checkpoint_folder import small_files
from model.config import ModelConfig
from model.vocabulary import Vocabulary

TOKENIZER = "tokenizer.json"


class IncompatibleDraftModel(ValueError):
    """The draft model cannot be used with this model; the message says why."""


def check_draft_model(model_folder: Path | str, draft_folder: Path | str) -> None:
    """Ids that only one of the vocabularies has are padding or tokens that were added later. They are never drafted.

    Raises:
        IncompatibleDraftModel: an id that both have means different things.
        InvalidModelConfig, UnsupportedModel: from the draft model's files.
    """
    ModelConfig.from_checkpoint(small_files(draft_folder))
    folders = [Path(small_files(folder)) for folder in (model_folder, draft_folder)]
    texts = [folder / TOKENIZER for folder in folders]
    if all(path.is_file() for path in texts) and texts[0].read_bytes() == texts[1].read_bytes():
        return
    ours, theirs = (Vocabulary.from_checkpoint(folder) for folder in folders)
    if (ours is None) != (theirs is None):
        raise IncompatibleDraftModel(f"only one of {model_folder} and the draft model {draft_folder} has a byte-level {TOKENIZER}")
    if ours is None or theirs is None:
        return  # neither can be checked
    differing = [at for at, (one, other) in enumerate(zip(ours.tokens, theirs.tokens, strict=False)) if one != other]
    if differing:
        first = differing[0]
        raise IncompatibleDraftModel(
            f"the draft model {draft_folder} has a different vocabulary: {len(differing)} of {min(len(ours.tokens), len(theirs.tokens))} "
            f"ids differ, such as {first}, which is {ours.tokens[first]!r} here and {theirs.tokens[first]!r} there; "
            "take one of the same family, such as Qwen2-0.5B for Qwen2-7B"
        )
