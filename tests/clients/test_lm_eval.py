"""lm-eval's loglikelihoods through a running server are those of transformers. No data set is fetched: the test writes its own.

As in `test_clients.py`, its environment comes from `python -m tests.clients.environments lm_eval`.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve.text.tokenizer import Tokenizer
from tests.clients import environments
from tests.system.server import Server, serving

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1200)]

TASK = """\
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
DOCUMENTS: list[dict[str, Any]] = [
    {"question": "The capital of France is", "choices": [" Paris", " London", " a city in Asia"], "answer": 0},
    {"question": "Question: Which city is the capital of Italy?\nAnswer:", "choices": [" Rome", " Madrid"], "answer": 0},
    {"question": "Die Hauptstadt von Österreich heißt", "choices": [" Wien", " Zürich", " Köln", " 🙂"], "answer": 0},
    {"question": "The opposite of hot is", "choices": [" cold", " warm"], "answer": 0},
]
LONG = "The sea is wide and the sky is blue. " * 40
"""Longer than a step of the server, so that its prompt is cut."""


class Oracle:
    """transformers with the same weights."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_folder(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Of a continuation, and whether it is what the model would have said."""
        ids, start = self._tokenizer.encode(context + continuation), len(self._tokenizer.encode(context))
        logits_TV = self._model(torch.tensor([ids])).logits[0, start - 1 : -1, : self._tokenizer.num_real_tokens].double()
        said = torch.tensor(ids[start:])
        return logits_TV.log_softmax(-1).gather(-1, said.unsqueeze(-1)).sum().item(), bool((logits_TV.argmax(-1) == said).all())


def test_loglikelihoods_are_those_of_transformers(demo_folder: Path, tmp_path: Path) -> None:
    if not environments.is_made("lm_eval"):
        pytest.skip("no environment of lm_eval: python -m tests.clients.environments lm_eval")
    documents = [*DOCUMENTS, {"question": LONG + "The sky is", "choices": [" blue", " green"], "answer": 0}]
    with serving(str(demo_folder), "--name", "demo", "--dtype", "float32", "--set", "engine.max_step_tokens=128") as server:
        told = evaluated(server, documents, tmp_path)
    oracle = Oracle(demo_folder)
    expected = [[oracle.loglikelihood(each["question"], choice) for choice in each["choices"]] for each in documents]
    for ours, theirs in zip(told, expected, strict=True):
        assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=5e-4)  # sums over a few tokens
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert {greedy for each in told for _, greedy in each} == {True, False}


def evaluated(server: Server, documents: list[dict[str, Any]], folder: Path) -> list[list[tuple[float, bool]]]:
    """Of each document what lm-eval got for each choice."""
    data, tasks, results = folder / "capitals.jsonl", folder / "tasks", folder / "results"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    tasks.mkdir()
    (tasks / "capitals.yaml").write_text(TASK.format(data=data))
    model = f"model=demo,base_url={server.url}/v1/completions,tokenizer_backend=remote,num_concurrent=2,max_retries=1,max_length=2048"
    command = [str(environments.folder() / "lm_eval/bin/lm-eval"), "run", "--model", "local-completions", "--model_args", model]
    command += ["--tasks", "capitals", "--include_path", str(tasks), "--log_samples", "--output_path", str(results), "--batch_size", "1"]
    environment = {
        **os.environ,
        "OPENAI_API_KEY": "none",
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900, cwd=folder)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
    (samples,) = results.rglob("samples_capitals_*.jsonl")
    told = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return [[(float(score), str(greedy) == "True") for score, greedy in sample["filtered_resps"]] for sample in told]
