"""ONNX Runtime's generator (PyPI: onnxruntime-genai) with all sequences of a workload in one batch; its own builder converts the model.

Without TOKENS_OUT it only converts the checkpoint. In 0.18 a batch must get all its prompts at once ("AppendTokens can only be called once
for batch_size > 1"), and its engine for many requests is for CUDA only; so a shared prefix is computed for every sequence.
"""

import json
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from benchmarks.workloads import VOCAB_SIZE, measure, workloads

FORMATS = ("int8", "int4")
SETTINGS = ("accuracy_level=4", "block_size=32", "prune_lm_head=true", "shared_embeddings=true", "hf_token=false")
"""8-bit activations, a scale per 32 weights, logits for the last token only, and one matrix shared by head and embedding."""


def converted(checkpoint: Path, form: str) -> Path:
    """Folder with the model converted for ONNX Runtime; created once."""
    target = checkpoint / f"onnxruntime-{form}"
    if (target / "genai_config.json").exists():
        return target
    os.environ.update({"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
    logging.disable(logging.INFO)  # suppresses a line per graph node
    from onnxruntime_genai.models.builder import create_model, parse_extra_options
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    scratch = checkpoint / f"onnxruntime-{form}.part"
    shutil.rmtree(scratch, ignore_errors=True)
    source = scratch / "source"
    source.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (source / name).symlink_to((checkpoint / name).resolve())
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"t": 0}, "t"))).save_pretrained(source)  # a tokenizer is required
    places = ("", str(source), str(scratch), form, "cpu", str(source))
    create_model(*places, **parse_extra_options(*places, list(SETTINGS)))
    shutil.rmtree(source)
    scratch.rename(target)
    return target


class OnnxRuntime:
    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        self.api = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        decoder = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"pad_token_id": VOCAB_SIZE, "decoder": decoder}}))  # of no prompt's tokens one is padding
        self.model = onnxruntime_genai.Model(config)

    def generate(self, prompts: list[list[int]], tokens_out: int) -> list[list[int]]:
        wanted = self.api.GeneratorParams(self.model)
        length = len(prompts[0])
        wanted.set_search_options(batch_size=len(prompts), min_length=length + tokens_out, max_length=length + tokens_out, do_sample=False)
        generator = self.api.Generator(self.model, wanted)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(tokens_out):
            generator.generate_next_token()
        return [generator.get_sequence(number)[length:].tolist() for number in range(len(prompts))]


def main() -> None:
    checkpoint, form, *rest = sys.argv[1:]
    assert form in FORMATS, "ONNX Runtime is measured with rounded weights only"
    place = converted(Path(checkpoint), form)
    if not rest:
        return
    tokens_out, *only = rest
    engine = OnnxRuntime(place, threads=2)
    measure(engine.generate, workloads(int(tokens_out), only))


if __name__ == "__main__":
    main()
