"""What a draft model has to read of a step, so that it has seen all that the model has."""

from engine.plan import Work


def tokens_to_catch_up(work: Work, said: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Where a work's tokens begin that the draft model has not computed when the work is done, and those tokens; perhaps none.

    ``said`` is what the work sampled. With it computed, the draft model has the KV of all that the model has: of the known tokens, and
    of the guesses that held. What is said last comes behind that only where it is asked what follows.

    Guesses of a work were guessed by this draft model in the step before, so it has computed all of them but the last.
    """
    last = said[-1:] if work.num_next_draft else ()
    if not work.num_draft:
        return work.start, (*work.tokens, *last)
    stop = work.start + len(work.tokens)
    refuted = work.num_draft - max(len(said) - 1, 0)
    return (stop - 1, (work.tokens[-1], *last)) if not refuted else (stop - refuted, last)
