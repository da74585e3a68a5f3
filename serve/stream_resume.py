"""Step 3 of a request whose stream broke: bring a choice to where its client is, so that only the rest is computed and sent.

The client holds what a lost front knew: the tokens that it was sent. They go to the engine as committed, as they do when
the router loses a replica, and through the choice, which then stands where the lost one stood: half a character, the
beginning of a stop string, the middle of a tool call. What a choice has told after some tokens depends on these tokens
alone, not on the pieces they came in, so its text goes on without a gap and without a letter twice.
"""

from collections.abc import Sequence
from dataclasses import replace

from engine.plan import TokenEvent
from serve.choice import Choice
from serve.errors import InvalidRequest
from serve.request import ChatRequest, CompletionRequest, SoFar, TextEvent
from serve.tools.request_tools import Reading

NOTHING = SoFar(choice=0, tokens=())


def had_of(request: ChatRequest | CompletionRequest, choice: int) -> SoFar:
    """What the client has of this choice."""
    return next((had for had in request.so_far if had.choice == choice), NOTHING)


def check_so_far(so_far: Sequence[SoFar], *, num_choices: int, vocabulary: int, most_tokens: int) -> None:
    """
    Raises:
        InvalidRequest: it names a choice that there is not, or one twice, or more tokens than an answer can have, or one that the
            model does not have.
    """
    known = [had.choice for had in so_far]
    if len(set(known)) != len(known) or not all(0 <= choice < num_choices for choice in known):
        raise InvalidRequest(f"so_far must name each choice once, from 0 to {num_choices - 1}", param="so_far")
    if any(len(had.tokens) > most_tokens for had in so_far):  # said before every token is looked at
        raise InvalidRequest(f"so_far must hold at most {most_tokens} tokens of a choice, the model's whole context", param="so_far")
    if not all(0 <= token < vocabulary for had in so_far for token in had.tokens):
        raise InvalidRequest(f"so_far must hold token ids from 0 to {vocabulary - 1}", param="so_far")


def caught_up(choice: Choice, reading: Reading | None, request_id: str, had: SoFar) -> TextEvent | None:
    """Have a choice say again, to nobody, what the client has; the end of the choice, if what it has is all there is."""
    if not had.tokens:
        return None
    event = TokenEvent(request_id=request_id, choice=had.choice, attempt=0, offset=0, tokens=had.tokens)
    told = choice.apply(event)
    if reading is not None and told is not None:
        told = reading.read(told)
    choice.leave_untold()
    if reading is not None:
        reading.leave_untold()
    return _end_alone(told) if told is not None and choice.finished else None


def unsaid(event: TextEvent, choice: Choice, had: SoFar) -> TextEvent:
    """The event without what the client has: an end that brings no token lets out text that came with the last token before."""
    return _end_alone(event) if had.tokens and choice.num_tokens == len(had.tokens) else event


def _end_alone(event: TextEvent) -> TextEvent:
    return replace(event, text="", tokens=(), tool_calls=())
