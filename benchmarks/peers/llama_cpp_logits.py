"""``python -m benchmarks.peers.llama_cpp_logits MODEL.gguf LOGITS.npy``: reads lists of tokens as JSON from stdin and writes the logits of
all positions (tokens of all lists, vocabulary) in float32."""

import json
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    import llama_cpp

    path, target = sys.argv[1:]
    lists: list[list[int]] = json.load(sys.stdin)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not read {path}: why is said above")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = longest = max(map(len, lists))
    settings.n_threads = settings.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, settings)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(longest, 0, 1)
    logits = []
    for tokens in lists:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        logits += [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (size,)).copy() for i in range(len(tokens))]
    np.save(Path(target), np.stack(logits))


if __name__ == "__main__":
    main()
