"""Verifies a sequence's draft: its tokens are accepted if they would have been sampled anyway.

The noise of an output position is a function of (seed, choice, position), so the model's token there is determined. A draft token is
accepted exactly if it is that token: speculation changes no answer, greedy or not.
"""

from collections.abc import Sequence

import numpy as np

from engine.plan import SampledTokens, Work
from engine.run.sampling.state import Row, SamplingState


def sampling_rows(work: Work, state: SamplingState, allowed: np.ndarray | None) -> list[Row]:
    """One row after the last known token, and one after each draft token, whose history includes the draft up to it."""
    first = state.next_position(work)
    if not work.num_draft:
        return [Row(state, first, allowed)]
    draft = work.tokens[len(work.tokens) - work.num_draft :]
    return [Row(state, first + count, allowed, draft[:count]) for count in range(work.num_draft + 1)]


def verify_draft(work: Work, answers: Sequence[SampledTokens]) -> SampledTokens:
    """From the results of `sampling_rows`: the tokens up to and including the first that differs from the draft, or that has no
    successor."""
    draft = work.tokens[len(work.tokens) - work.num_draft :]
    tokens, logprobs = answers[0].tokens, answers[0].logprobs
    for drafted, answer in zip(draft, answers[1:], strict=True):
        if tokens[-1:] != (drafted,) or answer.fault is not None:
            break
        tokens, logprobs = tokens + answer.tokens, logprobs + answer.logprobs
    return SampledTokens(work.sequence, tokens, logprobs, answers[0].fault)
