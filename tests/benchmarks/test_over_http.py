"""What `benchmarks.over_http` says of its rounds."""

from benchmarks.over_http import STREAMS, RoundFigures, table
from serve.load.client import Answer
from serve.load.report import Objective, summarise


def figures(*pauses_s: float) -> RoundFigures:
    """Streams of three pieces of text, the last after a pause."""
    answers = [Answer(due_s=0.0, token_s=[0.1, 0.11, 0.11 + pause], end_s=1.0, ending="done", output_tokens=3) for pause in pauses_s]
    return RoundFigures(summarise(answers, Objective(ttft_s=1.0, itl_s=0.1)), wall_s=1.0, cpu_s={})


def test_each_streams_longest_pause_is_told_for_us_and_for_peers() -> None:
    rounds = {
        "Manta": [dict.fromkeys(STREAMS, figures(0.2, 0.3, 0.9)), dict.fromkeys(STREAMS, figures(0.2, 0.5, 0.6))],
        "vLLM": [dict.fromkeys(STREAMS, figures(0.1, 0.1, 0.1))],
    }
    head, _, *rows = table(rounds).splitlines()
    assert head.endswith("a stream's longest pause, median | longest |")
    assert [row.split(" | ")[-2:] for row in rows] == 2 * [["400 ms", "900 ms |"], ["100 ms", "100 ms |"]]
    assert {row.count("|") for row in rows} == {head.count("|")}
