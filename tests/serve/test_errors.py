import inspect
import logging

import pytest

import cluster.errors
import engine.errors
import serve.errors
from engine.plan import TokenEvent
from serve.errors import (
    ERROR_MAPPINGS,
    MAX_MESSAGE_CHARS,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    ServeError,
    describe,
    error_from_event,
)

GRPC_CODES = {
    "ABORTED",
    "ALREADY_EXISTS",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "UNIMPLEMENTED",
}


def error_classes(module: object) -> list[type[Exception]]:
    found = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, Exception)]
    return [kind for kind in found if kind.__module__ == module.__name__]  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", [engine.errors, cluster.errors, serve.errors])
def test_every_error_of_the_house_is_in_the_table_itself(module: object) -> None:
    missing = [kind.__name__ for kind in error_classes(module) if kind not in ERROR_MAPPINGS and kind is not ServeError]
    assert missing == []


def test_the_table_speaks_of_known_codes_only() -> None:
    assert {wire.grpc for wire in ERROR_MAPPINGS.values()} <= GRPC_CODES
    assert all(400 <= wire.http < 600 for wire in ERROR_MAPPINGS.values())
    for kind, wire in ERROR_MAPPINGS.items():
        assert (wire.type == "server_error") == (wire.http >= 500), kind
        assert (wire.retry_after_s is not None) == (wire.http in (429, 503)), kind


def test_a_clients_mistake_is_told_in_its_own_words() -> None:
    body = describe(InvalidRequest("temperature must be a number from 0 to 2", param="temperature"))
    assert (body.message, body.type, body.param, body.code) == (
        "temperature must be a number from 0 to 2",
        "invalid_request_error",
        "temperature",
        "invalid_value",
    )
    assert (body.http_status, body.grpc_code, body.retry_after_s) == (400, "INVALID_ARGUMENT", None)


def test_a_model_that_is_not_here_is_answered_with_those_that_are() -> None:
    assert "'gpt-4o' here; this server has 'small', 'large'" in str(ModelNotFound("gpt-4o", ["small", "large"]))
    assert "list the models" in str(ModelNotFound("gpt-4o", [str(number) for number in range(5)]))


def test_a_subclass_that_is_not_in_the_table_is_told_as_its_base() -> None:
    class Odd(ModelNotFound):
        pass

    assert describe(Odd("x")).code == "model_not_found"


@pytest.mark.parametrize(
    ("error", "status", "code", "grpc"),
    [
        (
            ContextLengthExceeded(prompt_tokens=9, max_tokens=2, limit_tokens=10, param="messages"),
            400,
            "context_length_exceeded",
            "INVALID_ARGUMENT",
        ),
        (engine.errors.EmptyPrompt(), 400, "empty_prompt", "INVALID_ARGUMENT"),
        (engine.errors.PromptTooLong(num_tokens=9, limit_tokens=8), 400, "context_length_exceeded", "INVALID_ARGUMENT"),
        (engine.errors.QueueFull(limit=3), 429, "overloaded", "RESOURCE_EXHAUSTED"),
        (engine.errors.DeadlineExceeded(), 504, "deadline_exceeded", "DEADLINE_EXCEEDED"),
        (cluster.errors.NoReplicaReady(waited_s=1), 503, "unavailable", "UNAVAILABLE"),
    ],
)
def test_errors_of_all_layers_have_their_answer(error: Exception, status: int, code: str, grpc: str) -> None:
    body = describe(error)
    assert (body.http_status, body.code, body.grpc_code) == (status, code, grpc)


def test_an_errors_own_advice_when_to_try_again_wins() -> None:
    assert describe(engine.errors.QueueFull(limit=3, retry_after_s=7.0)).retry_after_s == 7.0
    assert describe(engine.errors.EngineStopped("x")).retry_after_s == 1.0


def test_the_loss_of_workers_tells_nothing_of_hosts_and_tracebacks() -> None:
    error = engine.errors.WorkersLost("rank 1 on 10.0.0.7: /secret/path", rank=1, host="10.0.0.7", rank_traceback="Traceback ...")
    body = describe(error)
    assert "10.0.0.7" not in body.message
    assert "secret" not in body.message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("password=hunter2 in /etc/x"),
        KeyError("k"),
        engine.errors.EngineError("at /x/y.py"),
        cluster.errors.ChannelError("raw"),
    ],
)
def test_an_unknown_error_is_told_by_an_id_that_the_log_explains(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        body = describe(error)
    assert (body.http_status, body.grpc_code, body.param, body.type) == (500, "INTERNAL", None, "server_error")
    assert str(error) not in body.message
    error_id = body.message.split()[-1]
    (record,) = caplog.records
    assert error_id in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_no_message_is_longer_than_the_bound() -> None:
    assert len(describe(InvalidRequest("x" * 10**6)).message) == MAX_MESSAGE_CHARS


@pytest.mark.parametrize("kind", error_classes(engine.errors) + error_classes(cluster.errors))
def test_an_error_that_crossed_as_an_event_is_the_same_class_again(kind: type[Exception]) -> None:
    event = TokenEvent("r", 0, 0, 0, finish_reason="error", error_kind=kind.__name__, error_message="what happened")
    error = error_from_event(event)
    assert type(error) is kind
    assert str(error) == "what happened"
    assert describe(error).code == ERROR_MAPPINGS[kind].code
    assert describe(error).retry_after_s == ERROR_MAPPINGS[kind].retry_after_s


@pytest.mark.parametrize("kind", ["SystemExit", "Nonsense", "WIRE", "", None, "annotations"])
def test_an_event_of_an_unknown_kind_is_an_internal_error(kind: str | None) -> None:
    error = error_from_event(TokenEvent("r", 0, 0, 0, finish_reason="error", error_kind=kind, error_message="x"))
    assert describe(error).http_status == 500


def test_an_end_nobody_asked_for_can_be_tried_again() -> None:
    assert describe(error_from_event(TokenEvent("r", 0, 0, 0, finish_reason="cancelled"))).http_status == 503
