"""The ledger of a request: every second is somewhere, once."""

from engine.plan import PhaseTimes, TokenEvent
from serve.request_timing import EngineTimes, Stopwatch


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def event(*, phase_times: PhaseTimes | None = None, end: bool = False) -> TokenEvent:
    return TokenEvent(
        request_id="r", choice=0, attempt=0, offset=0, tokens=(1,), phase_times=phase_times, finish_reason="stop" if end else None
    )


def test_its_entries_add_up_to_the_whole_time() -> None:
    clock = Clock()
    stopwatch = Stopwatch(arrived_s=49.0, clock=clock)
    stopwatch.submitted()
    clock.now_s += 4
    since_s = stopwatch.now()
    clock.now_s += 0.5
    stopwatch.detokenised(since_s)
    timing = stopwatch.timing(PhaseTimes(queue_s=0.5, prefill_s=1.0, decode_s=2.0))
    assert (timing.front_s, timing.detokenise_s, timing.network_s) == (1.0, 0.5, 0.5)
    assert timing.total_s == clock.now_s - 49.0


def test_it_is_written_as_a_server_timing_header() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock=clock)
    stopwatch.submitted()
    clock.now_s += 0.25
    said = stopwatch.timing(PhaseTimes(queue_s=0.0, prefill_s=0.125, decode_s=0.0)).server_timing()
    assert said.startswith("front;dur=0.000, queue;dur=0.000, prefill;dur=125.000, ")
    assert said.endswith("total;dur=250.000")


def test_a_choice_that_a_stop_string_ended_was_decoded_until_then() -> None:
    clock = Clock()
    times = EngineTimes(clock=clock)
    times.take(event(phase_times=PhaseTimes(queue_s=1.0, prefill_s=2.0, decode_s=0.0)))
    clock.now_s += 3
    stopped = event()
    times.take(stopped)
    assert times.at_end(stopped) == PhaseTimes(queue_s=1.0, prefill_s=2.0, decode_s=3.0)


def test_an_engine_that_ended_the_choice_itself_is_believed() -> None:
    times = EngineTimes(clock=Clock())
    told = PhaseTimes(queue_s=1.0, prefill_s=2.0, decode_s=9.0)
    last = event(phase_times=told, end=True)
    times.take(last)
    assert times.at_end(last) == told
