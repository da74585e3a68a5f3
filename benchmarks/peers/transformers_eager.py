"""transformers with its defaults: eager, `sdpa`, dynamic cache; uses the dtype that is fastest without bfloat16 instructions."""

import sys

import torch

from benchmarks.workloads import measure, workloads


def main() -> None:
    from transformers import AutoModelForCausalLM

    checkpoint, form, tokens_out, *only = sys.argv[1:]
    torch.set_num_threads(2)
    capabilities = torch.cpu.get_capabilities()
    dtype = torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], count: int) -> None:
        ids = torch.tensor(prompts)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0
        )

    assert form == "bf16", "transformers is measured with plain weights only"
    measure(generate, workloads(int(tokens_out), only))


if __name__ == "__main__":
    main()
