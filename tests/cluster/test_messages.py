import pytest

from cluster.errors import ChannelError
from cluster.messages import (
    KINDS,
    VERSION,
    BlockUpdate,
    Cancel,
    FrontDropped,
    Ping,
    Pong,
    RankFailed,
    RankProgress,
    RankReady,
    StepEvents,
    Stop,
    Submit,
    SubscribeBlocks,
    decode,
    encode,
)
from engine.executor import Capacity
from engine.plan import NewSequence, Rebalance, RebalanceResult, SampledTokens, StepPlan, StepResult, TokenEvent, TokenLogprobs, Work
from engine.request import Request, SamplingParams

SAMPLING = SamplingParams(temperature=0.7, logit_bias=((3, -1.5),), stop_token_ids=(2,), logprobs=2, seed=2**63 - 1)
EXAMPLES = [
    StepPlan(
        step=7,
        other_works=(Work(sequence=1, start=16, tokens=(5, 6), new_blocks=(3,), samples=True),),
        opened=(NewSequence(sequence=1, choice=2, num_prompt=18, sampling=SAMPLING, history=(1, 2)),),
        closed=(0,),
    ),
    StepPlan(step=8, other_works=(), rebalance=Rebalance(threshold=float("inf"))),
    StepResult(step=8, sampled=(), rebalanced=RebalanceResult(((3.0, 0.5),), 1.5, 1.25, num_moved=2)),
    StepResult(
        step=7,
        sampled=(SampledTokens(1, (9,), (TokenLogprobs(-0.5, ((9, -0.5), (4, -1.25))),)), SampledTokens(2, (), fault="NaN")),
        elapsed_s=0.01,
    ),
    RankProgress(rank=1, phase="weights", done=10, total=2**40),
    RankReady(rank=0, capacity=Capacity(num_blocks=8, block_tokens=16, max_context_tokens=128)),
    RankFailed(rank=1, host="a", step=None, message="ValueError: ü", traceback="Traceback\n"),
    Stop(),
    Submit(Request(id="r", choice=1, attempt=2, prompt=(1, 2, 3), committed=(4,), sampling=SAMPLING, salt="s", deadline_s=1.5), 0.5),
    Cancel("r", 1, 2),
    Ping(),
    FrontDropped(),
    SubscribeBlocks(wanted=True),
    BlockUpdate(3, whole=False, stored=b"12345678", evicted=b""),
    Pong(ready=True, num_running=3, num_waiting=4),
    StepEvents(
        (
            TokenEvent("r", 0, 0, 0, (1,), num_cached=16),
            TokenEvent("r", 0, 0, 1, finish_reason="error", error_kind="QueueFull", error_message="m"),
        )
    ),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_out_as_it_went_in(message: object) -> None:
    assert decode(encode(message)) == message  # type: ignore[arg-type]


def test_every_kind_has_an_example_here() -> None:
    assert {type(example) for example in EXAMPLES} == set(KINDS.values())


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "version none"),
        (bytes((VERSION + 1, 1)) + b"\x80", f"version {VERSION + 1}"),
        (bytes((VERSION, 99)) + b"\x80", "unknown kind 99"),
        (bytes((VERSION, 21)) + b"\x80", "malformed Cancel"),
        (encode(Cancel("r", 1, 2))[:-1], "malformed Cancel"),
        (bytes((VERSION, 21)) + b"\xa3abc", "malformed Cancel"),
    ],
)
def test_what_is_no_message_of_ours_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(ChannelError, match=says):
        decode(raw)
