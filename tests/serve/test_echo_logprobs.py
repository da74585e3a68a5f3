"""Log-probabilities of prompts over HTTP and gRPC: those of transformers, to 1e-4."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from manta_client import AsyncClient, BadRequest
from transformers import Qwen2ForCausalLM

from parallel.native.library import native
from serve.text.tokenizer import Tokenizer
from tests.serve.in_process import MODEL, Fronts

TEXT = "Once upon a time there was a sea. 🙂"
IDS = [9, 10, 11, 300, 301, 9, 10, 11]


@pytest.fixture(scope="module")
def oracle(tiny_folder: Path) -> Any:
    return Qwen2ForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logprobs_of(oracle: Any, ids: list[int], num_real_tokens: int) -> torch.Tensor:
    return oracle(torch.tensor([ids])).logits[0, :, :num_real_tokens].double().log_softmax(-1)


async def test_echo_with_logprobs_tells_of_every_token_of_every_prompt(both: Fronts, tiny_folder: Path, oracle: Any) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    text_ids = list(tokenizer.encode(TEXT))
    async with httpx.AsyncClient(base_url=both.http, timeout=60) as http:
        for prompt, ids in ((TEXT, text_ids), (IDS, IDS)):
            body = {"model": MODEL, "prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 0}
            for _ in range(2):  # the second time what the first left in the prefix cache is there
                whole = (await http.post("/v1/completions", json=body)).json()
                told = whole["choices"][0]["logprobs"]
                expected = logprobs_of(oracle, ids, tokenizer.num_real_tokens)
                assert [len(column) for column in told.values()] == [len(ids) + 3] * 4
                assert told["tokens"][: len(ids)] == [tokenizer.token_bytes(one).decode("utf-8", "replace") for one in ids]
                text, shown = whole["choices"][0]["text"], {special.text for special in tokenizer.special_tokens}
                assert told["text_offset"][0] == 0
                assert told["text_offset"][len(ids)] == len(prompt if isinstance(prompt, str) else tokenizer.decode(prompt))
                for token, at in zip(told["tokens"], told["text_offset"], strict=True):
                    assert text.startswith(token, at) or "\ufffd" in token or token in shown
                assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
                for place, token in enumerate(ids[1:]):
                    assert told["token_logprobs"][place + 1] == pytest.approx(expected[place, token].item(), abs=1e-4)
                    ranking = [
                        *zip(*(part.tolist() for part in expected[place].topk(2)), strict=True),
                        (expected[place, token].item(), token),
                    ]
                    by_text = {tokenizer.token_bytes(one).decode("utf-8", "replace"): value for value, one in reversed(ranking)}
                    assert told["top_logprobs"][place + 1] == pytest.approx(by_text, abs=1e-4)
                assert whole["usage"]["completion_tokens"] == 3
            streamed: dict[str, list[Any]] = {name: [] for name in told}
            async with openai.AsyncOpenAI(base_url=f"{both.http}/v1", api_key="none", max_retries=0) as client:
                async for chunk in await client.completions.create(**body, stream=True):
                    for name, column in (chunk.choices[0].logprobs.model_dump() if chunk.choices[0].logprobs else {}).items():
                        streamed[name] += column
            assert streamed == told


async def test_the_prompt_alone_can_be_asked_for(both: Fronts) -> None:
    async with httpx.AsyncClient(base_url=both.http, timeout=60) as http:
        body = {"model": MODEL, "prompt": [IDS, IDS[:1]], "echo": True, "logprobs": 0, "max_tokens": 0}
        whole = (await http.post("/v1/completions", json=body)).json()
        long, short = whole["choices"]
        assert long["finish_reason"] == short["finish_reason"] == "length"
        assert long["text"] == "".join(long["logprobs"]["tokens"])
        assert len(long["logprobs"]["token_logprobs"]) == len(IDS)
        assert short["logprobs"]["token_logprobs"] == [None]
        assert whole["usage"] | {"prompt_tokens_details": None} == {
            "prompt_tokens": len(IDS) + 1,
            "completion_tokens": 0,
            "total_tokens": len(IDS) + 1,
            "prompt_tokens_details": None,
        }
        refused = await http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 0})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.skipif(native() is None, reason="torch's products may differ in the last bits beside other sequences")
async def test_of_several_choices_one_has_the_prompt_scored_and_all_tell_of_it(both: Fronts) -> None:
    asked: dict[str, Any] = {"prompt": [IDS, TEXT], "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 0.9, "seed": 5}
    async with AsyncClient(both.grpc) as client:
        alone = await client.completions.create(**asked)
        before = len(both.source.requests)
        whole = await client.completions.create(**asked, n=3)
        streamed = await client.completions.stream(**asked, n=3).final()
        came = both.source.requests[before:]
        assert len(came) == 12
        assert [one.choice for one in came if one.sampling.prompt_logprobs is not None] == [0, 3] * 2
        assert streamed.choices == whole.choices
        for at, choice in enumerate(whole.choices):
            assert choice.prompt_logprobs == alone.choices[at // 3].prompt_logprobs
        assert whole.choices[0].logprobs == alone.choices[0].logprobs
        assert len({choice.token_ids for choice in whole.choices[:3]}) > 1
        (only,) = {
            choice.prompt_logprobs for choice in (await client.completions.create(**asked | {"prompt": IDS, "max_tokens": 0}, n=3)).choices
        }
        assert only == alone.choices[0].prompt_logprobs


async def test_grpc_tells_the_same(both: Fronts) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": [IDS, TEXT], "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 0}
    async with httpx.AsyncClient(base_url=both.http, timeout=60) as http, AsyncClient(both.grpc) as client:
        answer = await client.completions.create(**asked)
        assert (await client.completions.stream(**asked).final()).choices == answer.choices
        for choice, prompt in zip(answer.choices, (IDS, TEXT), strict=True):
            told = (await http.post("/v1/completions", json=asked | {"prompt": prompt})).json()["choices"][0]
            over_http = told["logprobs"]["token_logprobs"]
            assert choice.text == told["text"]
            assert [None, *(one.logprob for one in (*choice.prompt_logprobs, *choice.logprobs))] == pytest.approx(over_http, abs=1e-5)
            assert all(len(one.top_logprobs) == 2 for one in choice.prompt_logprobs)
        (alone,) = (await client.completions.create(**asked | {"prompt": IDS, "max_tokens": 0})).choices
        assert (alone.token_ids, alone.finish_reason) == ((), "length")
        assert [one.token_id for one in alone.prompt_logprobs] == IDS[1:]
        (plain,) = (await client.completions.create(**asked | {"prompt": IDS, "logprobs": None})).choices
        assert plain.prompt_logprobs == ()
        with pytest.raises(BadRequest, match="max_tokens"):
            await client.completions.create(**asked | {"max_tokens": 0, "echo": False})
