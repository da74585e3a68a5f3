"""Makes the speculator that the configuration asks for."""

from engine.config import EngineConfig
from engine.draft.draft_model import DraftModelProposer
from engine.draft.lookup import PromptLookup
from engine.draft.speculator import Speculator, StepLine


def make_speculator(config: EngineConfig, step_line: StepLine) -> Speculator | None:
    """None if speculative decoding is off."""
    match config.speculate:
        case None:
            return None
        case "lookup":
            return Speculator(PromptLookup(), max_tokens=config.max_draft_tokens, step_line=step_line)
        case "draft":
            return Speculator(DraftModelProposer(), max_tokens=config.max_draft_tokens, step_line=step_line)
