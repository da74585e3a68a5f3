"""The demo server as a user has it: two ranks, two fronts, real clients, and a rank that dies."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from manta_client import AsyncClient, Client

from tests.processes import command_of
from tests.system.server import Server, eventually, serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

QUESTION = [{"role": "user", "content": "Tell me about the ocean in three sentences."}]
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
EMOJI = [{"role": "user", "content": "Repeat exactly: 🌊🐟 naïve café 日本語"}]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("places") / "places.log"


@pytest.fixture(scope="module")
def server(demo_folder: Path, places: Path) -> Iterator[Server]:
    with serving(
        str(demo_folder), "--name", "demo", "--tensor-parallel", "2", "--dtype", "float32", environment={"MANTA_LOG_PLACES": str(places)}
    ) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        yield client


@pytest.fixture
def grpc(server: Server) -> Iterator[Client]:
    with Client(server.grpc, timeout=120) as client:
        yield client


def test_it_answers_in_english(http):
    answer = http.chat.completions.create(model="demo", messages=CAPITAL, temperature=0, max_tokens=32)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens


def test_the_only_model_is_listed_by_both_fronts(http, grpc):
    assert [model.id for model in http.models.list()] == ["demo"]
    assert [model.id for model in grpc.models.list()] == ["demo"]


@pytest.mark.parametrize("messages", [QUESTION, EMOJI], ids=["plain", "multi-byte"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_http_streamed_and_not_and_grpc_streamed_and_not_say_the_same(http, grpc, messages, temperature):
    asked = {"model": "demo", "messages": messages, "temperature": temperature, "seed": 7, "max_tokens": 48}
    whole = http.chat.completions.create(**asked)
    stream = list(http.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens
    over_grpc = grpc.chat.create(**asked)
    assert over_grpc.text == streamed
    with grpc.chat.stream(**asked) as deltas:
        assert "".join(delta.text for delta in deltas) == streamed


def test_a_seed_repeats_and_another_differs(http):
    asked = {"model": "demo", "messages": QUESTION, "temperature": 1.0, "max_tokens": 32}
    first, again, other = (http.chat.completions.create(**asked, seed=seed).choices[0].message.content for seed in (1, 1, 2))
    assert first == again != other


def test_a_stop_string_ends_the_answer_before_it(http, grpc):
    asked = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 48}
    whole = http.chat.completions.create(**asked).choices[0].message.content
    stop = whole[10:16]
    for choice in (
        http.chat.completions.create(**asked, stop=[stop]).choices[0],
        grpc.chat.create(**asked, stop=[stop]).choices[0],
    ):
        text = choice.message.content if hasattr(choice, "message") else choice.text
        assert text == whole[: whole.index(stop)]
        assert choice.finish_reason == "stop"


def test_many_at_once_answer_as_each_alone(http):
    def ask(index: int) -> str:
        answer = http.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": f"Count from {index}."}], temperature=0, max_tokens=16
        )
        return answer.choices[0].message.content

    alone = [ask(index) for index in range(6)]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, ask(i))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [together[index] for index in range(6)] == alone


def test_one_request_passes_the_fourteen_places_in_order(server, http, places):
    answer = http.chat.completions.create(model="demo", messages=CAPITAL, temperature=0, max_tokens=1)
    lines = re.findall(r"place=(\d+) request=(\S+) at=(\d+)", places.read_text())
    mine = sorted((int(at), int(place)) for place, request, at in lines if request == answer.id)
    seven, nine = (next(at for at, place in mine if place == wanted) for wanted in (7, 9))
    step = next((int(at), 8) for place, request, at in lines if place == "8" and seven <= int(at) <= nine)
    assert [place for _, place in sorted([*mine, step])] == list(range(1, 15))


def test_the_two_major_versions_of_openai_python_get_the_same_answer(server, http, tmp_path):
    expected = http.chat.completions.create(model="demo", messages=CAPITAL, temperature=0, max_tokens=16).choices[0].message.content
    assert openai.__version__.startswith("3.")
    older = tmp_path / "openai2"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(older), "openai>=2,<3"], check=True)
    script = f"""
import openai
assert openai.__version__.startswith("2."), openai.__version__
client = openai.OpenAI(base_url="{server.url}/v1", api_key="none", max_retries=0)
asked = dict(model="demo", messages={CAPITAL!r}, temperature=0, max_tokens=16)
whole = client.chat.completions.create(**asked).choices[0].message.content
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True))
assert streamed == whole
print(whole, end="")
"""
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": str(older)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_a_client_that_goes_away_ends_the_work_for_it(http, places):
    stream = http.chat.completions.create(model="demo", messages=QUESTION, stream=True, max_tokens=4000, extra_body={"ignore_eos": True})
    id = next(iter(stream)).id
    stream.close()

    def steps_taken() -> int:
        return places.read_text().count(f"place=7 request={id} ")

    def has_stopped() -> bool:
        before = steps_taken()
        time.sleep(2)
        return steps_taken() == before

    assert eventually(has_stopped, 60)
    assert steps_taken() < 4000


def test_completions_by_http_and_generate_by_grpc_say_the_same_and_count_the_same(http, grpc):
    asked = {"model": "demo", "prompt": "The capital of France is", "temperature": 0.8, "seed": 11, "max_tokens": 16}
    by_http = http.completions.create(**asked)
    by_grpc = grpc.completions.create(**asked)
    assert by_http.choices[0].text == by_grpc.text == grpc.completions.create(**asked).text
    assert (by_http.usage.prompt_tokens, by_http.usage.completion_tokens) == (by_grpc.usage.prompt_tokens, by_grpc.usage.completion_tokens)


async def test_the_asynchronous_client_says_what_the_synchronous_does(server, grpc):
    asked = {"messages": CAPITAL, "temperature": 0, "max_tokens": 16}
    async with AsyncClient(server.grpc, timeout=120) as client:
        whole = await client.chat.create(**asked)
        async with client.chat.stream(**asked) as deltas:
            streamed = "".join([delta.text async for delta in deltas])
    assert whole.text == streamed == grpc.chat.create(**asked).text


def test_manta_chat_prints_the_answer(server):
    command = [sys.executable, "-m", "serve", "chat", "--temperature", "0", "--endpoint", server.grpc, "What is the capital of France?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_a_compiler_of_grammars_waits_for_the_first_who_needs_it(server):
    def compiler() -> int:
        return sum("serve.structured.compiler_process" in " ".join(command_of(process)) for process in server.descendants)

    assert eventually(lambda: compiler() >= 1, 120)


def test_both_fronts_listen_on_loopback_only(server):
    ports = {server.http_port, server.grpc_port}
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in server.descendants
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports
    }
    assert listening == {("127.0.0.1", port) for port in ports}


def test_a_killed_rank_is_named_and_replaced_and_the_stream_goes_on_with_the_same_tokens(server, http):
    asked = {"model": "demo", "messages": QUESTION, "temperature": 0.9, "seed": 3, "max_tokens": 64, "extra_body": {"ignore_eos": True}}
    undisturbed = http.chat.completions.create(**asked).choices[0].message.content
    before = server.ranks()
    assert len(before) == 2
    text, became_unready = "", Future()
    for number, chunk in enumerate(http.chat.completions.create(**asked, stream=True)):
        text += chunk.choices[0].delta.content or ""
        if number == 8:
            before[1].kill()
            threading.Thread(target=lambda: became_unready.set_result(_becomes(server, ready=False))).start()
    assert text == undisturbed
    assert became_unready.result(60)
    assert _becomes(server, ready=True)
    answer = http.chat.completions.create(model="demo", messages=CAPITAL, temperature=0, max_tokens=32)
    assert "Paris" in answer.choices[0].message.content
    after = server.ranks()
    assert len(after) == 2
    assert not {process.pid for process in before} & {process.pid for process in after}, "an old rank is left"
    lost = rf"rank [01] on \S+ \(pid {before[1].pid}\) was lost"
    assert eventually(lambda: any(re.search(lost, line) for line in server.lines), 10)
    last = r"rank 1: \w+ number \d+ over tp, \d+ elements, begun [\d.]+ s ago"
    assert any(re.search(last, line) for line in server.lines), "what it did last with the others is in the post-mortem"


def test_a_killed_front_is_a_pause_for_the_library_and_a_broken_stream_for_a_plain_client(server, http, grpc):
    asked = {"model": "demo", "messages": QUESTION, "temperature": 0.9, "seed": 5, "max_tokens": 96}
    undisturbed = grpc.chat.create(**asked, ignore_eos=True)
    (front,) = server.fronts()
    plain = iter(http.chat.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}))
    seen = [next(plain) for _ in range(4)]
    text, ids = "", []
    with grpc.chat.stream(**asked, ignore_eos=True) as stream:
        for number, delta in enumerate(stream):
            text += delta.text
            ids += delta.token_ids
            if number == 8:
                front.kill()
        final = stream.final()
    assert (text, tuple(ids)) == (undisturbed.text, undisturbed.choices[0].token_ids)
    assert (final.text, final.usage.completion_tokens) == (text, 96)
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        seen += list(plain)
    assert not any(choice.finish_reason for chunk in seen for choice in chunk.choices)
    assert front.pid not in {process.pid for process in server.fronts()}
    assert "Paris" in http.chat.completions.create(model="demo", messages=CAPITAL, temperature=0, max_tokens=32).choices[0].message.content


def test_a_batch_that_is_killed_is_gone_on_with_and_nothing_is_lost_or_there_twice(server, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [
        {"model": "demo", "messages": [{"role": "user", "content": f"Count from {number}."}], "temperature": 0, "max_tokens": 24}
        for number in range(12)
    ]
    lines = [
        {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body} for number, body in enumerate(bodies)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "serve", "batch", str(source), "-o", str(output), "--url", server.url, "--concurrency", "2"]
    runs = 0
    while runs < 3:  # the first two are killed in their midst
        had = len(output.read_text().splitlines()) if output.exists() else 0
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        runs += 1
        if runs == 3:
            told, _ = run.communicate(timeout=240)
            assert run.returncode == 0, told
            break
        eventually(lambda had=had: output.exists() and len(output.read_text().splitlines()) >= had + 2, 120)
        run.kill()
        run.communicate(timeout=60)
        assert run.returncode == -signal.SIGKILL
        assert len(output.read_text().splitlines()) < len(lines)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == sorted(line["custom_id"] for line in lines)
    assert all(answer["response"]["status_code"] == 200 for answer in answers)
    texts = {answer["custom_id"]: answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers}
    assert len(set(texts.values())) > 1


def _becomes(server: Server, *, ready: bool) -> bool:
    def is_so() -> bool:
        try:
            return (httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200) == ready
        except httpx.HTTPError:
            return not ready

    return bool(eventually(is_so, 60))
