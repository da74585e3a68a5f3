"""What the draft model must compute after a step so that it has the KV of every token the model has."""

from engine.plan import Work


def tokens_to_catch_up(work: Work, sampled: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """``(start, tokens)``: the tokens of a work that the draft model has not computed when the work is done, perhaps none.

    ``sampled`` is what the work yielded. With these tokens computed, the draft model has the KV of all known tokens and of the accepted
    draft. The last sampled token is included only if a next draft is wanted, which begins behind it.

    The draft in a work was proposed by this draft model in the step before, so it has computed all of it but the last token.
    """
    last = sampled[-1:] if work.num_next_draft else ()
    if not work.num_draft:
        return work.start, (*work.tokens, *last)
    stop = work.start + len(work.tokens)
    num_rejected = work.num_draft - max(len(sampled) - 1, 0)
    return (stop - 1, (work.tokens[-1], *last)) if not num_rejected else (stop - num_rejected, last)
