"""Place 3 of a request whose stream broke: bring each choice to where its client is, so that only the rest is computed and sent.

The client has what a lost front knew: the tokens that it was sent. They go to the engine as committed, as they do when the router
loses a replica. They also go through the `Choice`, which then stands where the lost one stood: in the middle of a character, of a stop
string, of a tool call. What a choice has sent after some tokens depends on these tokens alone and not on how they were split into
events, so its text continues without a gap and without a repeated character.
"""

from collections.abc import Sequence
from dataclasses import replace

from engine.plan import TokenEvent
from serve.choice import Choice
from serve.errors import InvalidRequest
from serve.request import ChatRequest, CompletionRequest, SoFar, TextEvent
from serve.tools.request_tools import ChoiceCallParser

NOTHING = SoFar(choice=0, tokens=())


def received_of(request: ChatRequest | CompletionRequest, choice: int) -> SoFar:
    """What the client already has of this choice."""
    return next((received for received in request.so_far if received.choice == choice), NOTHING)


def check_so_far(so_far: Sequence[SoFar], *, num_choices: int, vocabulary: int, most_tokens: int) -> None:
    """Raise if what the client says it has received cannot be.

    Raises:
        InvalidRequest: it names a choice that does not exist, or one twice, or more tokens than an answer can have, or a token that the
            model does not have.
    """
    choices = [received.choice for received in so_far]
    if len(set(choices)) != len(choices) or not all(0 <= choice < num_choices for choice in choices):
        raise InvalidRequest(f"so_far must name each choice once, from 0 to {num_choices - 1}", param="so_far")
    if any(len(received.tokens) > most_tokens for received in so_far):  # before looking at every token
        raise InvalidRequest(f"so_far must hold at most {most_tokens} tokens of a choice, the model's whole context", param="so_far")
    if not all(0 <= token < vocabulary for received in so_far for token in received.tokens):
        raise InvalidRequest(f"so_far must hold token ids from 0 to {vocabulary - 1}", param="so_far")


def replay_received(choice: Choice, parser: ChoiceCallParser | None, request_id: str, received: SoFar) -> TextEvent | None:
    """Apply to ``choice`` the tokens that the client already has, and drop their text.

    Returns the end of the choice if those tokens are all of it, else None.
    """
    if not received.tokens:
        return None
    event = TokenEvent(request_id=request_id, choice=received.choice, attempt=0, offset=0, tokens=received.tokens)
    text = choice.apply(event)
    if parser is not None and text is not None:
        text = parser.read(text)
    choice.discard_pending()
    if parser is not None:
        parser.discard_pending()
    return _end_only(text) if text is not None and choice.finished else None


def without_received(event: TextEvent, choice: Choice, received: SoFar) -> TextEvent:
    """The event without what the client has: an end that brings no token can release text that came with the token before it."""
    return _end_only(event) if received.tokens and choice.num_tokens == len(received.tokens) else event


def _end_only(event: TextEvent) -> TextEvent:
    return replace(event, text="", tokens=(), tool_calls=())
