"""llama.cpp by its Python binding's C functions, with all sequences of a cell in one batch. `converted` wants torch, the rest does not."""

import sys
from pathlib import Path

import numpy as np

from benchmarks.cells import cells, measure

FORMATS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def converted(checkpoint: Path, form: str) -> Path:
    """The dense checkpoint as a GGUF file without a vocabulary, written beside it once."""
    import json

    import gguf
    from safetensors import safe_open

    target = checkpoint / f"{form}.gguf"
    if target.exists():
        return target
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target.with_suffix(".part"), "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    kind = gguf.GGMLQuantizationType[FORMATS[form]]
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (no dict)
            array = tensors.get_tensor(name).float().numpy()
            if array.ndim == 1:
                writer.add_tensor(_name(name), array)
            else:
                writer.add_tensor(_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.with_suffix(".part").rename(target)
    return target


def _name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, _, layer, *module, suffix = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(module)]}.{suffix}"


class LlamaCpp:
    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 36_000, 8_192, 512, 32
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.batch = llama_cpp.llama_batch_init(8_192, 0, 1)

    def generate(self, prompts: list[list[int]], tokens_out: int) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        shared = 0
        if len(prompts) > 1 and prompts[0][:1024] == prompts[1][:1024] and len(prompts[0]) > 1024:
            shared = 1024  # computed once and copied, as its server would
            self._decode([(0, i, token, False) for i, token in enumerate(prompts[0][:shared])])
            for sequence in range(1, len(prompts)):
                self.api.llama_memory_seq_cp(self.api.llama_get_memory(self.context), 0, sequence, 0, shared)
        length = len(prompts[0])
        entries = [(s, i, prompt[i], i == length - 1) for s, prompt in enumerate(prompts) for i in range(shared, length)]
        tokens = self._decode(entries)
        for position in range(length, length + tokens_out - 1):
            tokens = self._decode([(s, position, token, True) for s, token in enumerate(tokens)])

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        wanted = []
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (sequence, position, token, samples) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, position, 1, sequence, samples
            if samples:
                wanted.append(i)
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        size = 151_936
        return [int(np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), (size,)).argmax()) for i in wanted]


def main() -> None:
    checkpoint, form, tokens_out, *only = sys.argv[1:]
    path = converted(Path(checkpoint), form)
    engine = LlamaCpp(path, threads=2)
    measure(engine.generate, [cell for cell in cells(int(tokens_out)) if not only or any(part in cell.name for part in only)])


if __name__ == "__main__":
    main()
