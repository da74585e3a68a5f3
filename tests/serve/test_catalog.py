"""Several models under one roof: who answers, and what is said for all."""

import dataclasses
import functools
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest

from serve.catalog import Catalog
from serve.drain_gate import DrainGate
from serve.errors import ModelNotFound
from serve.http.app import create_app
from serve.model_facts import ModelFacts
from serve.request import ChatRequest, CompletionRequest, Message
from serve.service import Service
from serve.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedSource, events_of

tokenizer_in = functools.cache(Tokenizer.from_folder)


def service_called(name: str, folder: Path, says: str, *, ready: bool = True) -> Service:
    tokenizer = tokenizer_in(folder)
    (ids,) = tokenizer.encode_plain([says])
    source = ScriptedSource(lambda request: events_of(request, [ids]))
    source.is_ready = ready
    return Service(model=ModelFacts.from_checkpoint(folder, name=name, tokenizer=tokenizer), tokenizer=tokenizer, source=source)


@pytest.fixture
def catalog(smol_folder: Path) -> Catalog:
    return Catalog([service_called("one", smol_folder, "I am one"), service_called("two", smol_folder, "I am two")])


def chat(model: str) -> ChatRequest:
    return ChatRequest(request_id="r", model=model, messages=(Message(role="user", content="hi"),))


@pytest.mark.parametrize("name", ["one", "two"])
async def test_every_request_is_answered_by_the_model_that_it_names(catalog: Catalog, name: str) -> None:
    (choice,) = (await catalog.collect(chat(name))).choices
    assert choice.text == f"I am {name}"
    async with aclosing(catalog.chat(chat(name))) as events:
        assert "".join([event.text async for event in events]) == f"I am {name}"
    completion = CompletionRequest(request_id="r", model=name, prompts=("hi",))
    async with aclosing(catalog.complete(completion)) as events:
        assert "".join([event.text async for event in events]) == f"I am {name}"


@pytest.mark.parametrize("name", ["three", "", "one/", "../one"])
async def test_a_name_that_nobody_has_is_refused(catalog: Catalog, name: str) -> None:
    for ask in (lambda: catalog.model(name), lambda: catalog.service(name)):
        with pytest.raises(ModelNotFound):
            ask()
    with pytest.raises(ModelNotFound):
        await catalog.collect(chat(name))
    with pytest.raises(ModelNotFound):
        await anext(catalog.complete(CompletionRequest(request_id="r", model=name, prompts=("hi",))))


def test_all_models_are_listed_in_order(catalog: Catalog) -> None:
    assert [facts.name for facts in catalog.models()] == ["one", "two"]
    assert catalog.model("two").name == "two"


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True), (False, False)])
def test_it_is_ready_when_some_model_is_and_tells_of_each(smol_folder: Path, first: bool, second: bool) -> None:
    services = [service_called(name, smol_folder, "", ready=ready) for name, ready in (("one", first), ("two", second))]
    catalog = Catalog(services)
    assert catalog.ready() == (first or second)
    assert catalog.readiness() == {"one": first, "two": second}
    gate = DrainGate(catalog)
    assert gate.readiness() == catalog.readiness()
    gate.drain()
    assert gate.readiness() == {"one": False, "two": False}


async def test_its_front_tells_of_one_model_to_whoever_names_it(smol_folder: Path) -> None:
    catalog = Catalog([service_called("one", smol_folder, "", ready=True), service_called("two", smol_folder, "", ready=False)])
    transport = httpx.ASGITransport(app=create_app(lambda: catalog))
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as http:
        assert (await http.get("/readyz")).json() == {"status": "ready", "models": {"one": "ready", "two": "not ready"}}
        assert [(await http.get("/readyz", params={"model": name})).status_code for name in ("one", "two", "three")] == [200, 503, 404]


def test_two_services_of_one_name_are_refused(smol_folder: Path) -> None:
    service = service_called("one", smol_folder, "")
    with pytest.raises(ValueError, match="names of their own"):
        Catalog([service, service])
    with pytest.raises(ValueError, match="names of their own"):
        Catalog([])


def test_model_facts_are_those_of_the_service(catalog: Catalog) -> None:
    assert dataclasses.replace(catalog.model("one"), name="two", created=0) == dataclasses.replace(catalog.model("two"), created=0)
