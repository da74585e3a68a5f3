import dataclasses
from pathlib import Path
from typing import Any

import pytest

from model.generation_config import GenerationDefaults
from serve.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from serve.limits import Limits
from serve.model_facts import ModelFacts
from serve.request import ChatRequest, CompletionRequest, Message, Options
from serve.validation import Validator

MODEL = ModelFacts(
    name="tiny",
    folder=Path("nowhere"),
    max_context_tokens=100,
    vocab_size=640,
    num_real_tokens=600,
    defaults=GenerationDefaults(eos_token_ids=(2, 0), temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
    created=0,
)
VALIDATOR = Validator(model=MODEL, limits=Limits())


def chat(*messages: Message, **fields: Any) -> ChatRequest:
    messages = messages or (Message(role="user", content="hi"),)
    return ChatRequest(**({"request_id": "r1", "model": "tiny", "messages": messages} | fields))


def completion(*prompts: Any, **fields: Any) -> CompletionRequest:
    return CompletionRequest(**({"request_id": "r1", "model": "tiny", "prompts": prompts or ("hi",)} | fields))


def resolve(options: Options | None = None, **said: Any) -> Any:
    arguments = {"num_prompt_tokens": 10, "param": "messages", "max_tokens": None, "seed": 77} | said
    return VALIDATOR.sampling(options or Options(), **arguments)


GOOD = {
    "temperature": [0, 0.0, 2, 2.0, 1e-9],
    "top_p": [1e-9, 1, 1.0],
    "min_p": [0, 1],
    "top_k": [-1, 0, 1, 10**6],
    "repetition_penalty": [0.01, 1, 10],
    "presence_penalty": [-2, 2.0],
    "frequency_penalty": [-2, 2.0],
    "seed": [0, -(2**63), 2**63 - 1],
    "n": [1, 8],
    "max_tokens": [1, 2**31 - 1],
    "min_tokens": [0, 5],
    "stop": [("a",) * 4, ("x" * 256,), ("é" * 128,)],
    "stop_token_ids": [(0, 599), (1,) * 64],
    "logit_bias": [((0, 100), (599, -100.0)), tuple((i % 600, 0.0) for i in range(1024))],
    "logprobs": [0, 20],
}
BAD = {
    "temperature": [float("nan"), float("inf"), -1, -1e-9, 2.0001, "0.5", True, 10**400],
    "top_p": [0, 0.0, -0.1, 1.1, float("nan"), "1"],
    "min_p": [-1, 1.0001, float("nan")],
    "top_k": [-2, -5, 1.5, True, 2**31],
    "repetition_penalty": [0, 0.0099, 1e-308, -1, 10.1, float("nan"), float("inf")],
    "presence_penalty": [2.1, -2.1, float("nan")],
    "frequency_penalty": [2.1, -2.1, float("nan")],
    "seed": [2**63, -(2**63) - 1, 0.5, "7"],
    "n": [0, -1, 9, 1.5, 10**30, True],
    "max_tokens": [0, -1, 2**63, 1.0],
    "min_tokens": [-1, 2**63],
    "stop": [("a",) * 5, ("",), ("x" * 257,), ("é" * 129,), (7,), ("\ud800",)],
    "stop_token_ids": [(600,), (-1,), (1.5,), (True,), (1,) * 65],
    "logit_bias": [((600, 1.0),), ((-1, 1.0),), ((1, 100.1),), ((1, float("nan")),), ((0, 0.0),) * 1025, (("AI", 1.0),)],
    "logprobs": [-1, 21, True],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in GOOD.items() for value in values])
def test_values_at_the_limit_are_taken(field: str, value: Any) -> None:
    VALIDATOR.chat(chat(options=Options(**{field: value})))
    VALIDATOR.completion(completion(options=Options(**{field: value})))


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_values_beyond_the_limit_are_refused_by_the_name_of_their_field(field: str, value: Any) -> None:
    for check, request in ((VALIDATOR.chat, chat), (VALIDATOR.completion, completion)):
        with pytest.raises(InvalidRequest) as raised:
            check(request(options=Options(**{field: value})))
        in_chat = check == VALIDATOR.chat
        assert raised.value.param == ("top_logprobs" if field == "logprobs" and in_chat else field)
        assert len(str(raised.value)) < 200


def test_every_option_has_its_cases() -> None:
    assert GOOD.keys() == BAD.keys() == {field.name for field in dataclasses.fields(Options)} - {"ignore_eos", "format"}


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (chat(messages=()), "messages"),
        (chat(messages=(Message(role="user", content="x"),) * 2_049), "messages"),
        (chat(Message(role="function", content="x")), "messages[0].role"),
        (chat(Message(role="user", content="x"), Message(role="<|im_start|>", content="x")), "messages[1].role"),
        (chat(Message(role="user", content=None)), "messages[0].content"),  # type: ignore[arg-type]
        (chat(Message(role="user", content="\udfff")), "messages[0].content"),
        (chat(Message(role="user", content="x", name="\udfff")), "messages[0].name"),
        (chat(request_id=""), "request_id"),
        (chat(request_id="x" * 129), "request_id"),
        (chat(request_id="a\nb"), "request_id"),
        (chat(priority=1001), "priority"),
        (completion("x", priority=-1001), "priority"),
        (chat(deadline_s=float("nan")), "deadline_s"),
        (chat(options=Options(max_tokens=3, min_tokens=4)), "min_tokens"),
        (completion(prompts=()), "prompt"),
        (completion(*["x"] * 129), "prompt"),
        (completion(()), "prompt"),
        (completion((-1,)), "prompt"),
        (completion((600,)), "prompt"),
        (completion((1.0,)), "prompt"),
        (completion("\ud800"), "prompt"),
        (completion(*["x"] * 17, options=Options(n=8)), "n"),
    ],
)
def test_requests_of_the_wrong_shape_are_refused(request_: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        (VALIDATOR.chat if isinstance(request_, ChatRequest) else VALIDATOR.completion)(request_)
    assert raised.value.param == param


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "http://x/y", "Tiny", "x" * 10**6])
def test_an_unknown_model_is_not_found_and_not_echoed_at_length(name: str) -> None:
    with pytest.raises(ModelNotFound) as raised:
        VALIDATOR.chat(chat(model=name))
    assert raised.value.param == "model"
    assert len(str(raised.value)) < 300


def test_log_probabilities_of_prompts_are_bounded_over_all_choices() -> None:
    validator = dataclasses.replace(VALIDATOR, limits=Limits(prompt_logprobs=60))
    assert validator.prompt_logprobs(completion(options=Options(logprobs=5)), 1_000) is None
    assert validator.prompt_logprobs(completion(echo=True), 1_000) is None
    assert validator.prompt_logprobs(completion(echo=True, options=Options(logprobs=0)), 60) == 0
    assert validator.prompt_logprobs(completion(echo=True, options=Options(logprobs=1, n=3)), 10) == 1
    with pytest.raises(InvalidRequest, match="asks for 66 log-probabilities of the prompts, and at most 60") as raised:
        validator.prompt_logprobs(completion(echo=True, options=Options(logprobs=1, n=3)), 11)
    assert raised.value.param == "logprobs"


def test_no_answer_at_all_can_be_asked_for_only_where_the_prompt_is_told() -> None:
    nothing = Options(max_tokens=0)
    VALIDATOR.completion(completion(echo=True, options=nothing))
    assert resolve(nothing, param="prompt").max_tokens == 0
    for refused in (lambda: VALIDATOR.completion(completion(options=nothing)), lambda: VALIDATOR.chat(chat(options=nothing))):
        with pytest.raises(InvalidRequest) as raised:
            refused()
        assert raised.value.param == "max_tokens"


def test_a_very_long_prompt_of_ids_is_refused_for_its_length() -> None:
    with pytest.raises(ContextLengthExceeded, match="holds 100 tokens"):
        VALIDATOR.completion(completion((7,) * 100))


def test_what_the_client_does_not_say_the_model_recommends() -> None:
    params = resolve()
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert (params.presence_penalty, params.frequency_penalty, params.min_p, params.logprobs) == (0.0, 0.0, 0.0, None)
    assert (params.seed, params.max_tokens, params.min_tokens) == (77, 90, 0)


def test_what_the_client_says_wins_even_when_it_is_zero() -> None:
    params = resolve(Options(temperature=0, top_k=0, top_p=1, repetition_penalty=1, seed=0, max_tokens=90, logprobs=0))
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0, 0, 1, 1)
    assert (params.seed, params.max_tokens, params.logprobs) == (0, 90, 0)


def test_without_recommendations_everything_is_off() -> None:
    bare = Validator(model=dataclasses.replace(MODEL, defaults=GenerationDefaults()), limits=Limits())
    params = bare.sampling(Options(), num_prompt_tokens=1, param="prompt", max_tokens=16, seed=1)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (1.0, 1.0, 0, 1.0)
    assert (params.stop_token_ids, params.max_tokens) == ((), 16)


@pytest.mark.parametrize(("top_k", "expected"), [(-1, 0), (0, 0), (5, 5), (599, 599), (600, 0), (10**6, 0)])
def test_a_top_k_that_keeps_all_tokens_is_off(top_k: int, expected: int) -> None:
    assert resolve(Options(top_k=top_k)).top_k == expected


def test_ends_of_sequence_are_merged_into_the_stop_ids_unless_ignored() -> None:
    assert resolve(Options(stop_token_ids=(5, 2))).stop_token_ids == (2, 0, 5)
    assert resolve(Options(stop_token_ids=(5, 2), ignore_eos=True)).stop_token_ids == (5, 2)


def test_seeds_are_what_the_engine_can_hold() -> None:
    assert resolve(Options(seed=-1)).seed == 2**63 - 1
    assert resolve(Options(seed=-(2**63))).seed == 0


@pytest.mark.parametrize(
    ("options", "said", "param"),
    [
        (Options(max_tokens=91), {}, "max_tokens"),
        (Options(min_tokens=91), {}, "min_tokens"),
        (Options(), {"num_prompt_tokens": 100}, "messages"),
        (Options(max_tokens=1), {"num_prompt_tokens": 100}, "messages"),
        (Options(), {"num_prompt_tokens": 5000, "param": "prompt", "max_tokens": 16}, "prompt"),
    ],
)
def test_prompt_and_answer_must_fit_the_context(options: Options, said: dict[str, Any], param: str) -> None:
    with pytest.raises(ContextLengthExceeded) as raised:
        resolve(options, **said)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "advice"),
    [
        (10, 91, "shorten the prompt by 1, or ask for at most 90 to generate"),
        (99, 99, "shorten the prompt by 98, or ask for at most 1 to generate"),
        (10, 100, "ask for at most 90 to generate"),
        (10, 5000, "ask for at most 90 to generate"),
        (100, 1, "shorten the prompt"),
        (100, 5000, "shorten the prompt"),
        (101, 0, "shorten the prompt"),
    ],
)
def test_what_exceeds_the_context_is_what_is_to_be_shortened(prompt_tokens: int, max_tokens: int, advice: str) -> None:
    error = ContextLengthExceeded(prompt_tokens=prompt_tokens, max_tokens=max_tokens, limit_tokens=100, param="prompt")
    assert error.message.split("; ")[1:] == [advice]


def test_one_token_of_room_is_enough() -> None:
    assert resolve(num_prompt_tokens=99).max_tokens == 1
    assert resolve(num_prompt_tokens=99, max_tokens=16).max_tokens == 1
    assert resolve(Options(min_tokens=40), max_tokens=16).max_tokens == 40


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one token"):
        resolve(num_prompt_tokens=0)


def test_limits_are_positive_and_print_in_one_line() -> None:
    assert "\n" not in str(Limits())
    assert "body_bytes=4194304" in str(Limits())
    with pytest.raises(ValueError, match="choices"):
        Limits(choices=0)
