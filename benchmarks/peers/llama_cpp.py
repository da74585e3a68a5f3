"""llama.cpp through its Python binding's C functions; all sequences of a workload form one batch. Only `converted` needs torch."""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.workloads import measure, workloads

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
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
PLAIN = ("ffn_gate_inp.", "ffn_gate_inp_shexp.")
"""Tensors that are float32 in GGUF."""
EMBEDDING = "model.embed_tokens.weight"
TOP = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def converted(checkpoint: Path, form: str, head: str | None = None, into: Path | None = None) -> Path:
    """The checkpoint as a GGUF file without vocabulary, written once, next to it or into the folder ``into``. ``head``: format of embedding
    and head, if it differs from ``form``."""
    target = (into or checkpoint) / f"{form}.gguf"
    if target.exists():
        return target
    import json

    import gguf
    from safetensors import safe_open  # needs torch, which the other engines' environment may lack

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target.with_suffix(".part"), config["model_type"].replace("_", ""))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    kinds = dict.fromkeys((TOP[EMBEDDING], TOP["lm_head.weight"]), gguf.GGMLQuantizationType[FORMATS[head or form]])
    of_layers = gguf.GGMLQuantizationType[FORMATS[form]]
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        targets = _by_target(tensors.keys())
        if "num_experts" in config:  # llama.cpp does not support tied embeddings for this architecture, so the matrix is stored twice
            targets.setdefault(TOP["lm_head.weight"], [EMBEDDING])
        for name, parts in targets.items():
            array = np.stack([tensors.get_tensor(part).float().numpy() for part in parts])
            array = array if "_exps." in name else array[0]
            if array.ndim == 1 or any(part in name for part in PLAIN):
                writer.add_tensor(name, array.reshape(-1) if "shexp" in name and len(array) == 1 else array)
            else:
                kind = kinds.get(name, of_layers)
                writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.with_suffix(".part").rename(target)
    return target


def _by_target(names: Iterable[str]) -> dict[str, list[str]]:
    """GGUF tensor name to the checkpoint's tensors that it is made of: several for experts, in order."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if name in TOP:
            found[TOP[name]] = {0: name}
            continue
        _, _, layer, *module, suffix = name.split(".")
        is_expert = module[:2] == ["mlp", "experts"]
        target = EXPERTS[module[3]] if is_expert else NAMES[".".join(module)]
        found.setdefault(f"blk.{layer}.{target}.{suffix}", {})[int(module[2]) if is_expert else 0] = name
    return {target: [parts[number] for number in sorted(parts)] for target, parts in found.items()}


class LlamaCpp:
    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not read {path}: why is said above")
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
            shared = 1024  # computed once and copied, as llama.cpp's server does
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
    measure(engine.generate, workloads(int(tokens_out), only))


if __name__ == "__main__":
    main()
