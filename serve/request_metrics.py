"""The observer behind /metrics: latencies and token counts of every request, measured in the front."""

import time
from collections.abc import Callable, Collection
from typing import Literal

from serve import metric_names as names
from serve.errors import invalid_code
from serve.metrics import Instruments
from serve.request import AnyRequest, TextEvent, Usage
from serve.request_observer import failure_code


class RequestMetrics:
    """``models``: allowed values of the label model_name. Requests for other models are counted only as failures, with an empty name."""

    def __init__(self, instruments: Instruments, models: Collection[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._instruments, self._models, self._clock = instruments, models, clock

    def begin(self, request: AnyRequest) -> "_RequestTimes":
        return _RequestTimes(self._instruments, self._label_of(request), request.arrived_s, self._clock)

    def refused(self, request: AnyRequest, error: BaseException) -> None:
        """Count a request that is refused before it begins."""
        self._instruments.count(names.FAILURES, model_name=self._label_of(request), code=failure_code(error))

    def answered_with(self, api: Literal["http", "grpc"], error: BaseException) -> None:
        """Count a request that was answered with this error, if the request itself is to blame."""
        if (code := invalid_code(error)) is not None:
            self._instruments.count(names.INVALID_REQUESTS, api=api, code=code)

    def _label_of(self, request: AnyRequest) -> str:
        return request.model if request.model in self._models else ""


class _RequestTimes:
    def __init__(self, instruments: Instruments, model: str, arrived_s: float | None, clock: Callable[[], float]) -> None:
        self._instruments, self._model, self._clock = instruments, model, clock
        self._begun_s = clock() if arrived_s is None else arrived_s
        self._first_s: float | None = None
        self._last_s: dict[int, float] = {}
        """Time of each choice's latest token."""
        self._usage = Usage(prompt_tokens=0, completion_tokens=0)
        self._reasons: list[str] = []
        self._end: TextEvent | None = None
        instruments.add(names.IN_PROGRESS, 1, model_name=model)

    def event(self, event: TextEvent) -> None:
        if event.tokens:
            self._tokens(event)
        if event.finish_reason is not None:
            self._end = event  # the last choice to finish decides when the request ends
            self._reasons.append(event.finish_reason)
        self._usage = event.usage or event.usage_so_far or self._usage

    def ended(self) -> None:
        for reason in self._reasons[:1]:  # a request counts once, with the reason of the choice that finished first
            self._instruments.count(names.REQUESTS, model_name=self._model, finished_reason=reason)
        now_s = self._clock()
        self._observe(names.REQUEST_SECONDS, now_s - self._begun_s)
        self._observe(names.REQUEST_PROMPT_TOKENS, self._usage.prompt_tokens)
        self._observe(names.REQUEST_GENERATION_TOKENS, self._usage.completion_tokens)
        if self._first_s is not None and self._usage.completion_tokens > 1:
            self._observe(names.TIME_PER_TOKEN, (now_s - self._first_s) / (self._usage.completion_tokens - 1))
        if self._end is not None and (phase_times := self._end.phase_times) is not None:
            self._observe(names.QUEUE_SECONDS, phase_times.queue_s)
            self._observe(names.PREFILL_SECONDS, phase_times.prefill_s)
            self._observe(names.DECODE_SECONDS, phase_times.decode_s)
            self._observe(names.INFERENCE_SECONDS, phase_times.prefill_s + phase_times.decode_s)
        self._close()

    def failed(self, error: BaseException) -> None:
        self._instruments.count(names.FAILURES, model_name=self._model, code=failure_code(error))
        self._close()

    def _tokens(self, event: TextEvent) -> None:
        now_s = self._clock()
        if self._first_s is None:
            self._first_s = now_s
            self._observe(names.TIME_TO_FIRST_TOKEN, now_s - self._begun_s)
        last_s = self._last_s.get(event.choice)
        if last_s is not None:
            for _ in event.tokens:
                self._observe(names.INTER_TOKEN, (now_s - last_s) / len(event.tokens))
        self._last_s[event.choice] = now_s
        self._instruments.count(names.GENERATION_TOKENS, len(event.tokens), model_name=self._model)

    def _close(self) -> None:
        self._instruments.count(names.PROMPT_TOKENS, self._usage.prompt_tokens, model_name=self._model)
        self._instruments.count(names.CACHED_TOKENS, self._usage.cached_tokens, model_name=self._model)
        self._instruments.add(names.IN_PROGRESS, -1, model_name=self._model)

    def _observe(self, metric: names.Metric, value: float) -> None:
        self._instruments.observe(metric, value, model_name=self._model)
