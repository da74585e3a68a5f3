"""Place 13 of an unstreamed request: adds up the events of a stream into one result."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from engine.errors import EngineStopped
from serve.request import ChoiceResult, Result, TextEvent, TextToken, ToolCall, ToolCallDelta, Usage


async def collect_result(stream: AsyncGenerator[TextEvent, None], request_id: str) -> Result:
    """The whole answer, from the events of its stream.

    Raises:
        EngineStopped: a choice has no end. Also whatever the stream raises.
    """
    choices: dict[int, _ChoiceCollector] = {}
    usage, timing, held_s = Usage(prompt_tokens=0, completion_tokens=0), None, 0.0
    async with aclosing(stream) as events:
        async for event in events:
            choices.setdefault(event.choice, _ChoiceCollector()).add(event)
            usage, timing, held_s = event.usage or usage, event.timing, max(held_s, event.held_s)
    results = tuple(choices[index].result(index) for index in sorted(choices))
    return Result(request_id=request_id, choices=results, usage=usage, held_s=held_s, timing=timing)


class _ChoiceCollector:
    """The events of one choice so far."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._tokens: list[TextToken] = []
        self._prompt_tokens: tuple[TextToken, ...] = ()
        self._calls: dict[int, ToolCallDelta] = {}
        self._end: TextEvent | None = None

    def add(self, event: TextEvent) -> None:
        self._text.append(event.text)
        self._tokens += event.tokens
        self._prompt_tokens += event.prompt_tokens
        for call in event.tool_calls:
            known = self._calls.get(call.index)
            self._calls[call.index] = call if known is None else known.with_more(call.arguments)
        if event.finish_reason is not None:
            self._end = event

    def result(self, index: int) -> ChoiceResult:
        if self._end is None or self._end.finish_reason is None:
            raise EngineStopped("a choice has no end")
        return ChoiceResult(
            choice=index,
            text="".join(self._text),
            tokens=tuple(self._tokens),
            prompt_tokens=self._prompt_tokens,
            finish_reason=self._end.finish_reason,
            stop_reason=self._end.stop_reason,
            tool_calls=tuple(ToolCall(id=call.id or "", name=call.name or "", arguments=call.arguments) for call in self._calls.values()),
        )
