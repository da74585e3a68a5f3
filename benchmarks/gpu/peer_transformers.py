"""transformers with the same model shape on the same device: eager mode, `sdpa` attention, growing cache."""

import gc
import statistics
import time
from typing import Any

import torch

from benchmarks.gpu.models import config_of
from benchmarks.gpu.results import Results


def measure(
    results: Results, part: str, shape: str, device: torch.device, *, layers: int | None, cells: list[tuple[int, int, int]]
) -> None:
    """``cells``: (sequences, tokens in, tokens out)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw: dict[str, Any] = dict(config_of(shape, layers))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = AutoConfig.for_model(raw.pop("model_type"), **{name: value for name, value in raw.items() if name != "torch_dtype"})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(before)
    for sequences, tokens_in, tokens_out in cells:
        results.go_on()
        rates = [_rate(model, device, sequences, tokens_in, tokens_out, config.vocab_size) for _ in range(2)]
        results.add(part, f"transformers {sequences} x {tokens_in}/{tokens_out}", statistics.median(rates[1:]), "tokens/s")
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.inference_mode()
def _rate(model: Any, device: torch.device, sequences: int, tokens_in: int, tokens_out: int, vocab_size: int) -> float:
    ids = torch.randint(0, vocab_size, (sequences, tokens_in), device=device)
    began = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens_out, min_new_tokens=tokens_out, pad_token_id=0
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return sequences * tokens_out / (time.perf_counter() - began)
