"""Whether a draft model can guess for a model: both must mean the same by their token ids."""

from pathlib import Path

from model.checkpoint_folder import small_files
from model.config import ModelConfig
from model.vocabulary import Vocabulary

TOKENIZER = "tokenizer.json"


class IncompatibleDraftModel(ValueError):
    """The draft model is of no use to this model; the message says why."""


def check_draft_model(model_folder: Path | str, draft_folder: Path | str) -> None:
    """Ids beyond the smaller vocabulary are padding, or tokens that one of the two has been given later: they are never guessed.

    Raises:
        IncompatibleDraftModel: an id that both have means one thing to one of them and another to the other.
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
        return  # nobody can tell
    differing = [at for at, (one, other) in enumerate(zip(ours.tokens, theirs.tokens, strict=False)) if one != other]
    if differing:
        first = differing[0]
        raise IncompatibleDraftModel(
            f"the draft model {draft_folder} has another vocabulary: {len(differing)} of {min(len(ours.tokens), len(theirs.tokens))} ids "
            f"mean something else, as {first}, which is {ours.tokens[first]!r} here and {theirs.tokens[first]!r} there; "
            "take one of the same family, such as Qwen2-0.5B for Qwen2-7B"
        )
