"""Accuracy of quantised weights: compare predictions on the same text in each of Manta's formats, and llama.cpp's, with float32.

    python -m benchmarks.quantisation_quality [MODEL] [--smeared 2] [--only int4] [--llama-cpp PYTHON] [--text FILE ...] [--tokens 384]

Prints the mean KL divergence of the next-token distribution from float32's, how often the most likely token is the same, and perplexity.

The demo model's layers were stored in 4 bits (Q4_1), so their weights lie on grids of sixteen values, unlike those of other models.
``--smeared`` moves every weight by uniform noise within its grid step. The resulting models predict nearly the same, but their weights are
distributed as after training. Trust a rounding rule only if it also does well on these.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.peers.llama_cpp import EMBEDDING, converted
from engine.run.settings import RunnerConfig
from engine.run.start import choose_weight_formats, resolve_dtype
from model.batch import ForwardBatch
from model.checkpoint import Checkpoint, write_checkpoint
from model.config import ModelConfig
from model.kv_cache import KvCache
from model.load import load_model
from parallel.groups import single_rank_groups
from serve.config import ModelSettings
from serve.model_source import find_model

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
TEXTS = ("README.md", "docs/architecture.md", "engine/planner.py", "LICENSE")
"""English prose, Markdown, Python, and legal English."""
FORMATS = {
    "bfloat16": RunnerConfig(device="cpu", dtype="bfloat16"),
    "int8": RunnerConfig(device="cpu", dtype="float32", quantize="int8"),
    "int8, rows in 8 bits": RunnerConfig(device="cpu", quantize="int8"),
    "int4": RunnerConfig(device="cpu", dtype="float32", quantize="int4"),
    "int4, rows in 8 bits": RunnerConfig(device="cpu", quantize="int4"),
}
"""With "rows in 8 bits" activations are rounded too, on processors that multiply 8 bits natively; on others it is like the entry before."""
LLAMA_CPP = {"llama.cpp Q8_0": "int8", "llama.cpp Q4_0, head Q8_0": "int4"}
BLOCK_TOKENS = 16
GRID_STEPS = 40
"""More steps than a 4-bit grid has."""


@dataclass(frozen=True)
class Quality:
    kl: float
    same: float
    perplexity: float


def log_probs(folder: Path, config: RunnerConfig, texts: Sequence[Tensor]) -> Iterator[Tensor]:
    """For each text (T int64), log probabilities of the next token at every position (T, V), computed as on a rank."""
    model_config, dtype = ModelConfig.from_checkpoint(folder), resolve_dtype(config.dtype, CPU)
    with Checkpoint(folder) as checkpoint:
        formats = choose_weight_formats(checkpoint, model_config, config, dtype, CPU)
        model, _ = load_model(
            checkpoint,
            model_config,
            single_rank_groups(),
            device=CPU,
            dtype=dtype,
            block_tokens=BLOCK_TOKENS,
            format=formats.matrices,
            table_format=formats.table,
            kv_may_be_bfloat16=formats.rounds_activations,
        )
    blocks = torch.arange(-(-max(map(len, texts)) // BLOCK_TOKENS), dtype=torch.int32)
    cache = KvCache(model.kv_layout, len(blocks), CPU)
    for tokens_T in texts:
        count = len(tokens_T)
        places_T = torch.arange(count)
        batch = ForwardBatch(
            tokens_T=tokens_T,
            positions_T=places_T,
            slots_T=places_T,
            block_tables_SM=blocks.unsqueeze(0),
            lengths_S=torch.tensor([count], dtype=torch.int32),
            query_starts=(0, count),
            context_lengths=(count,),
            num_decodes=0,
            logit_rows_R=places_T,
        )
        with torch.no_grad():
            yield F.log_softmax(model(batch, cache).float(), -1)


def log_probs_of_llama_cpp(folder: Path, form: str, python: str, texts: Sequence[Tensor], scratch: Path) -> Iterator[Tensor]:
    """Like `log_probs`, by llama.cpp (``python``: an interpreter with llama_cpp). Embedding and head are always in 8 bits."""
    path, found = converted(folder, form, head="int8", into=scratch), scratch / "logits.npy"
    asked = json.dumps([tokens_T.tolist() for tokens_T in texts])
    command = [python, "-m", "benchmarks.peers.llama_cpp_logits", str(path), str(found)]
    subprocess.run(command, input=asked, text=True, check=True, cwd=ROOT)
    logits_AV = np.load(found, mmap_mode="r")
    first = 0
    for tokens_T in texts:
        yield F.log_softmax(torch.tensor(logits_AV[first : first + len(tokens_T)]), -1)
        first += len(tokens_T)


def compared(reference: Sequence[Tensor], found: Iterator[Tensor], texts: Sequence[Tensor]) -> Quality:
    divergence = same = surprise = 0.0
    for wanted_TV, found_TV, tokens_T in zip(reference, found, texts, strict=True):
        divergence += float((wanted_TV.exp() * (wanted_TV - found_TV)).sum())
        same += float((wanted_TV.argmax(-1) == found_TV.argmax(-1)).sum())
        surprise -= float(found_TV[:-1].gather(-1, tokens_T[1:, None]).sum())
    count = sum(map(len, texts))
    return Quality(divergence / count, same / count, float(np.exp(surprise / (count - len(texts)))))


def smeared(folder: Path, seed: int, into: Path) -> Path:
    """The checkpoint with uniform noise added to every weight of its layers, within the grid step of its group of 32."""
    random = torch.Generator().manual_seed(seed)
    with Checkpoint(folder) as checkpoint:
        tensors = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and name != EMBEDDING:
            groups_GC = tensor.float().view(-1, 32)
            sorted_GC = groups_GC.sort(-1).values
            steps_GC = sorted_GC.diff(dim=-1)
            least_G1 = (
                sorted_GC[:, -1:] - sorted_GC[:, :1]
            ) / GRID_STEPS  # a smaller difference is the same grid value with a rounding error
            steps_G1 = torch.where(steps_GC > least_G1, steps_GC, torch.inf).amin(-1, keepdim=True).nan_to_num(posinf=0)
            tensors[name] = (groups_GC + (torch.rand(groups_GC.shape, generator=random) - 0.5) * steps_G1).view(tensor.shape)
    config = json.loads((folder / "config.json").read_text())
    into.mkdir()
    write_checkpoint(into, tensors, config)
    return into


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="a checkpoint, by default the demo model")
    parser.add_argument(
        "--smeared", type=int, default=0, metavar="TIMES", help="also compare this many models with noise within the grid steps"
    )
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has llama_cpp (`benchmarks/peers/set_up.sh`)")
    parser.add_argument("--text", type=Path, nargs="+", default=[ROOT / name for name in TEXTS])
    parser.add_argument("--tokens", type=int, default=384, help="of each text")
    asked = parser.parse_args()
    folder = find_model(ModelSettings(source=asked.model)).folder
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [torch.tensor(tokenizer.encode(file.read_text()).ids[: asked.tokens]) for file in asked.text]
    print(f"{sum(map(len, texts))} tokens of {', '.join(file.name for file in asked.text)}\n")
    print("| model | weights | KL from float32 | the likeliest token the same | perplexity |\n|---|---|---|---|---|")
    for number in range(asked.smeared + 1):
        with tempfile.TemporaryDirectory() as scratch:
            place = smeared(folder, number, Path(scratch) / "smeared") if number else folder
            name = f"smeared {number}" if number else asked.model
            reference = list(log_probs(place, RunnerConfig(device="cpu", dtype="float32"), texts))
            _print(name, "float32", compared(reference, iter(reference), texts))
            for weights, config in FORMATS.items():
                if asked.only in weights:
                    _print(name, weights, compared(reference, log_probs(place, config, texts), texts))
            for weights, form in LLAMA_CPP.items():
                if asked.llama_cpp and asked.only in form:
                    found = log_probs_of_llama_cpp(place, form, asked.llama_cpp, texts, Path(scratch))
                    _print(name, weights, compared(reference, found, texts))


def _print(model: str, weights: str, found: Quality) -> None:
    print(f"| {model} | {weights} | {found.kl:.4f} | {100 * found.same:.1f} % | {found.perplexity:.2f} |", flush=True)


if __name__ == "__main__":
    main()
