"""Clients that people have already, unchanged, against a running server with the demo model.

Their packages come from `python -m tests.clients.environments`; a client that was not made there is skipped.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.clients import environments
from tests.system.server import Server, serving

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[2]
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```\n((?:curl|echo) .*?)^```", re.MULTILINE | re.DOTALL)
PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module")
def server(demo_folder: Path) -> Iterator[Server]:
    with serving(str(demo_folder), "--name", "demo", "--dtype", "float32", "--set", "model.pooling=last") as server:
        yield server


def made(name: str) -> None:
    if not environments.is_made(name):
        pytest.skip(f"no environment of {name}: python -m tests.clients.environments {name}")


def run(command: list[str], server: Server, *, cwd: Path | None = None) -> str:
    """What it printed; it must succeed."""
    environment = {**os.environ, "MANTA_HTTP": f"{server.url}/v1", "MANTA_MODEL": "demo", "OPENAI_API_KEY": "none"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=400, cwd=cwd)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    return done.stdout


def script(name: str, server: Server, file: str | None = None) -> Any:
    """What a client's script tells in its last line."""
    made(name)
    path = SCRIPTS / (file or f"{name}.py")
    os.environ["MANTA_NODE_PACKAGES"] = str(environments.folder() / name)
    safe = ["-P"] if path.suffix == ".py" else []  # files are named as the libraries they import
    return json.loads(run([*environments.interpreter(name), *safe, str(path)], server).splitlines()[-1])


@pytest.mark.parametrize(("name", "major"), [("openai2", "2."), ("openai3", "3.")])
def test_openai_python(server: Server, name: str, major: str) -> None:
    told = script(name, server, "openai_python.py")
    assert told.pop("version").startswith(major)
    assert told.pop("completion").startswith(" Paris")
    assert told == {
        "text": PARIS,
        "response": PARIS,
        "streamed": PARIS,
        "usage": [45, 45],
        "logprobs": [8, 2],
        "models": ["demo"],
        "refused": "temperature",
        "called": ["get_weather", ["unit"]],
        "after the result": True,
    }


def test_openai_node(server: Server) -> None:
    told = script("openai_node", server, "openai_node.mjs")
    assert told.pop("completion").startswith(" Paris")
    assert told == {
        "text": PARIS,
        "streamed": PARIS,
        "helper": PARIS,
        "usage": [45, 45],
        "models": ["demo"],
        "refused": [400, "temperature"],
        "called": ["get_weather", ["unit"], True],
    }


def test_vercel_ai(server: Server) -> None:
    told = script("vercel_ai", server, "vercel_ai.mjs")
    assert told == {"text": PARIS, "streamed": PARIS, "usage": [45, 45], "finishReason": "stop"}


def test_vercel_ai_with_tools_and_objects(server: Server) -> None:
    assert script("vercel_ai", server, "vercel_ai_tools.mjs") == {
        "called": ["get_weather", ["unit"], True],
        "got": True,
        "then": [2, True],
        "streamed": True,
        "objects": [True, True, True],
        "choice": True,
    }


def test_langchain(server: Server) -> None:
    assert script("langchain", server) == {"text": PARIS, "streamed": PARIS, "usage": 45}


def test_langchain_with_tools_and_objects(server: Server) -> None:
    assert script("langchain", server, "langchain_tools.py") == {
        "called": ["get_weather", True],
        "streamed": True,
        "any": True,
        "after the result": True,
        "places": {"json_schema": "Place", "function_calling": "Place"},
    }


def test_langchain_over_responses(server: Server) -> None:
    assert script("langchain", server, "langchain_responses.py") == {
        "text": PARIS,
        "streamed text": True,
        "usage": 45,
        "called": ["get_weather", True],
        "streamed": True,
        "after the result": True,
        "place": "Place",
    }


def test_openai_agents(server: Server) -> None:
    called = ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert script("openai_agents", server) == {
        "asked": 2,
        "kinds": called,
        "answered": True,
        "streamed": True,
        "typed": "Place",
        "handed": ["Clerk", ["handoff_call_item", "handoff_output_item", "message_output_item"]],
        "session": [True, 4],
        "usage": 2,
    }


def test_litellm(server: Server) -> None:
    assert script("litellm", server) == {"text": PARIS, "streamed": PARIS, "usage": 45, "refused": "BadRequestError"}


def test_litellm_with_tools_and_objects(server: Server) -> None:
    assert script("litellm", server, "litellm_tools.py") == {
        "called": ["get_weather", ["unit"], "tool_calls"],
        "streamed": True,
        "required": True,
        "after the result": True,
        "place": ["city", "millions"],
    }


def test_pydantic_ai(server: Server) -> None:
    assert script("pydantic_ai", server) == {"text": PARIS, "streamed": PARIS, "usage": 45}


def test_pydantic_ai_with_a_tool_and_typed_outputs(server: Server) -> None:
    assert script("pydantic_ai", server, "pydantic_ai_tools.py") == {
        "asked": True,
        "kinds": [["user-prompt"], ["tool-call"], ["tool-return"], ["tool-call"], ["tool-return"]],
        "typed": "Place",
        "streamed": True,
        "native": "Place",
    }


def test_instructor(server: Server) -> None:
    assert script("instructor", server) == {
        "TOOLS": "Place",
        "TOOLS_STRICT": "Place",
        "JSON_SCHEMA": "Place",
        "JSON": "Anything",
        "partly": [True, True],
    }


def test_llama_index(server: Server) -> None:
    told = script("llama_index", server)
    assert told.pop("completion").startswith(" Paris")
    assert told == {"text": PARIS, "streamed": PARIS}


def test_qwen_agent_with_its_own_function_calling(server: Server) -> None:
    told = script("qwen_agent", server)
    assert told == {"text": PARIS, "streamed": PARIS, "with functions": [["assistant", True]]}


def test_qwen_agents_own_example_of_function_calling(server: Server) -> None:
    called = ["get_current_weather", ["location"], "assistant", True]
    assert script("qwen_agent", server, "qwen_agent_tools.py") == {"nous": called, "qwen": called, "raw": called}


def examples() -> list[Any]:
    """Whole programs in pages that speak of the demo server, and those of the client's own page, which else talk to a scripted one."""
    pages = [
        ROOT / name
        for name in ("README.md", "docs/http.md", "docs/tools.md", "docs/structured-output.md", "docs/embeddings.md", "client/README.md")
    ]
    found = [(page, number, code) for page in pages for number, code in enumerate(EXAMPLE.findall(page.read_text()))]
    return [
        pytest.param(code, id=f"{page.relative_to(ROOT).with_suffix('')} {number}")
        for page, number, code in found
        if "FakeServer" not in code
    ]


@pytest.mark.parametrize("code", examples())
def test_examples_of_the_pages_run(server: Server, code: str) -> None:
    for said, here in (("http://127.0.0.1:8000", server.url), ("grpc://127.0.0.1:9000", server.grpc)):
        code = code.replace(said, here)
    environment = {**os.environ, "MANTA_ENDPOINT": server.grpc}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=400, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() or "except" in code


def test_commands_of_the_pages_run(server: Server, tmp_path: Path) -> None:
    (curl,) = COMMANDS.findall((ROOT / "README.md").read_text())
    (batch,) = COMMANDS.findall((ROOT / "docs/http.md").read_text())
    assert json.loads(shell(curl, server, tmp_path))["choices"][0]["message"]["content"]
    shell(batch, server, tmp_path)
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["response"]["status_code"] == 200


def shell(commands: str, server: Server, folder: Path) -> str:
    here = commands.replace("http://127.0.0.1:8000", server.url)
    here = here.replace("manta batch", f"{sys.executable} -m serve batch --url {server.url}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-ec", here], capture_output=True, text=True, check=False, timeout=400, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout


def test_aiperf(server: Server, demo_folder: Path, tmp_path: Path) -> None:
    made("aiperf")
    load = ["--concurrency", "2", "--request-count", "6", "--synthetic-input-tokens-mean", "50", "--output-tokens-mean", "8"]
    target = ["-m", "demo", "-u", server.url, "--endpoint-type", "chat", "--streaming", "--tokenizer", str(demo_folder)]
    command = [str(environments.folder() / "aiperf/bin/aiperf"), "profile", *target, *load]
    run([*command, "--output-artifact-dir", str(tmp_path), "--ui", "none"], server, cwd=tmp_path)
    (result,) = tmp_path.rglob("profile_export_aiperf.json")
    told = json.loads(result.read_text())
    assert (told["request_count"]["avg"], told["request_error_rate"]["avg"], told["error_summary"]) == (6, 0, [])
    assert told["usage_completion_tokens"]["avg"] > 0
    assert told["usage_completion_tokens_diff_pct"]["avg"] == 0  # what we count, and what its tokenizer does
    assert told["time_to_first_token"]["avg"] > 0


def test_guidellm(server: Server, demo_folder: Path, tmp_path: Path) -> None:
    made("guidellm")
    command = [str(environments.folder() / "guidellm/bin/guidellm"), "run"]
    command += ["--backend", f"kind=openai_http,target={server.url},model=demo", "--profile", "kind=concurrent,streams=2"]
    command += ["--constraint", "kind=max_requests,count=6", "--tokenizer", f"kind=hf_auto,model={demo_folder}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=8", "--output", f"kind=json,path={tmp_path / 'told.json'}"]
    run(command, server, cwd=tmp_path)
    (benchmark,) = json.loads((tmp_path / "told.json").read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"] == {"successful": 6, "errored": 0, "incomplete": 0, "total": 6}
    assert benchmark["metrics"]["output_token_count"]["successful"]["total_sum"] == 6 * 8


def test_k6_puts_load_on_both_fronts(server: Server) -> None:
    """Every answer is whole, none is refused: so k6's own thresholds say, by which it fails."""
    made("k6")
    each = 40
    said = {
        "MANTA_HTTP": f"{server.url}/v1",
        "MANTA_GRPC": server.grpc.removeprefix("grpc://"),
        "MANTA_MODEL": "demo",
        "MANTA_ITERATIONS": str(each),
    }
    command = [str(environments.folder() / "k6/bin/k6"), "run", "--quiet", "--no-usage-report", "--no-color"]
    command += [argument for name, value in said.items() for argument in ("--env", f"{name}={value}")]
    told = json.loads(run([*command, str(SCRIPTS / "load.k6.js")], server).splitlines()[-1])
    print(told)
    assert (told["whole"], told["refused"], told["failed"]) == (4 * each, 0, 0)


def test_a_reader_of_reflection_can_call_a_method_it_knew_nothing_of(server: Server) -> None:
    """As grpcurl does: services, then the files that describe one, then a call made from nothing but these."""
    with grpc.insecure_channel(server.grpc.removeprefix("grpc://")) as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)

        def ask(**question: str) -> reflection_pb2.ServerReflectionResponse:
            return next(reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)])))

        names = {service.name for service in ask(list_services="").list_services_response.service}
        assert {"manta.v1.MantaService", "manta.v1.AdminService", "grpc.health.v1.Health"} <= names
        pool = descriptor_pool.DescriptorPool()

        def learn(files: reflection_pb2.FileDescriptorResponse) -> None:
            for raw in files.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(raw)
                for needed in file.dependency:
                    try:
                        pool.FindFileByName(needed)
                    except KeyError:
                        learn(ask(file_by_filename=needed).file_descriptor_response)
                pool.Add(file)

        learn(ask(file_containing_symbol="manta.v1.MantaService").file_descriptor_response)
        method = pool.FindServiceByName("manta.v1.MantaService").FindMethodByName("Chat")
        request_class, response_class = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        said = {"model": "demo", "messages": [{"role": "ROLE_USER", "content": "What is the capital of France?"}]}
        request = json_format.ParseDict(said | {"options": {"temperature": 0, "maxTokens": 16}}, request_class())
        call = channel.unary_unary(
            "/manta.v1.MantaService/Chat",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response_class.FromString,
        )
        assert call(request, timeout=60).choices[0].message.content == PARIS
