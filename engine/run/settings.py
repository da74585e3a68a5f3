"""Settings of one rank."""

from dataclasses import dataclass
from typing import Literal

from engine.config import EngineConfig

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
BackendName = Literal["auto", "reference", "cpu", "native", "cuda", "flashinfer"]
QuantizeName = Literal["int8", "int4", "fp8"]
KvDtypeName = Literal["auto", "fp8"]
DispatchChoice = Literal["auto", "local", "all_to_all"]


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """How a rank computes and how much memory it may use. The same on every rank of a replica."""

    device: str = "auto"
    """"auto" (CUDA if there is a device, else the CPU), "cpu", "cuda" or "cuda:<index>"."""
    dtype: DtypeName = "auto"
    """Dtype of activations and KV cache, on CUDA also of weights. "auto": bfloat16 on CUDA; float32 on CPUs (bfloat16 if our kernels are
    not built and the processor multiplies it natively). With "auto", products on CPUs also round activations if the processor multiplies
    the rounded ones natively: to bfloat16 with weights stored in bfloat16, to 8 bits with quantised weights. "float32" never rounds
    activations."""
    quantize: QuantizeName | None = None
    """Quantise the weights while loading. "int8": one scale per 128 weights; "int4": one per 32 (embedding and head stay int8); "fp8",
    on GPUs from Ada on: weights and activations, multiplied by the matrix units (embedding and head are not quantised). Takes a half or
    a quarter of bfloat16's memory, and is up to that much faster. None = as stored."""
    kv_dtype: KvDtypeName = "auto"
    """Dtype of the KV cache. "auto": the dtype of the computation, or bfloat16 on CPUs that multiply it natively if `dtype` allows
    rounding; "fp8" (e4m3, on GPUs): half of bfloat16's memory and traffic, so twice as many tokens fit, with keys and values rounded to
    three bits of mantissa."""
    num_threads: int | None = None
    """Threads that torch may use in this process. None = the host's physical cores, shared evenly by its ranks."""
    kv_cache_bytes: int | None = None
    """Memory for the KV cache on each rank. None = `kv_memory_fraction` decides."""
    kv_memory_fraction: float | None = None
    """On CUDA the fraction of the device's memory for weights, activations and KV together (None = 0.9). On a CPU the fraction of the
    memory left after loading that KV may use, for all ranks on the host together (None = 0.3, at most 4 GiB); it is shared evenly by the
    replicas that Ray could place on the host at once, counted by their CPUs."""
    max_context_tokens: int | None = None
    """The most tokens of a sequence, prompt and answer together. It can lower the model's own limit but not raise it. None = the model's
    limit."""
    attention_backend: BackendName = "auto"
    """"auto" takes our own kernels for the device. "flashinfer" (CUDA, with `flashinfer-python` installed) uses FlashInfer for prefill;
    not with an FP8 KV cache, nor where ranks share heads unevenly."""
    dispatch: DispatchChoice = "auto"
    """How tokens reach routed experts on other ranks. "local": every rank sees all tokens of the stage and an all-reduce follows, for
    the lowest latency; "all_to_all": each token is sent only to the ranks of its experts, for the least traffic. "auto": local if all
    ranks of a stage are on one host, else all_to_all."""
    redundant_experts: int = 0
    """Routed experts of each layer that every ep position holds beyond its even share, so that the busiest experts have several copies.
    Costs their memory: 64 experts over 16 positions are 4 each; with 1 redundant, 5."""
    draft_model: str | None = None
    """The draft model for `engine.speculate: draft`: a folder that exists on every host, a repository, or a URL, as in `model.source`.
    It should be small and must have the same vocabulary, as Qwen2-0.5B has for Qwen2-7B and Qwen2-72B. The sampling rank of each shard
    holds all of it, quantised as `quantize` says, and shares its KV memory between both models."""
    cuda_graphs: bool = True
    """On CUDA, capture decode-only steps for several numbers of sequences as CUDA graphs at the start, and replay them: launching takes
    most of a small model's step. Costs seconds at the start and some memory, and changes no answer. False = launch every step."""
    prompt_graphs: bool = False
    """With `cuda_graphs`, also replay steps with prompts of up to 1,024 tokens, in pieces between which attention is launched. Off
    because it was tested on a CPU only, not on a device."""
    quick_launches: bool = False
    """On CUDA, launch kernels with what an earlier launch of the same kind found out, instead of through Triton, whose launches take the
    host two to three times as long. Changes no answer. Off because on a device it has run with two kernels only, not with whole models."""
    symmetric_memory: bool = True
    """On CUDA, ranks of one host sum through memory that all their devices map (torch's symmetric memory): one kernel for the small sums
    of a decoding step. It is tried at the start; if it is unavailable or a sum is wrong, NCCL is used and the log says why. False =
    always NCCL."""
    tune_tiles: bool = True
    """On CUDA, measure at the first start on a kind of device the best kernels and tile sizes for products of quantised weights, of
    routed experts, and of plain weights with one or two rows. The results are kept in the cache folder ($MANTA_CACHE). Costs up to a
    minute once. Other kernels may round differently, as cuBLAS's do."""
    early_launches: bool = False
    """On CUDA (Hopper), let the kernels of steps of up to 64 tokens start while the previous kernel ends, and load their weights
    meanwhile. Changes no answer. Off because on a device it has run with chains of products only, not with whole models."""
    gated_gemv: bool = False
    """On CUDA, compute an MLP's gate, up and SwiGLU of one or two rows in one kernel instead of two, for each product where that was
    measured to be faster (`tune_tiles`). Sums may round differently than with the kernels that are used otherwise. Off because it was
    tested on a CPU only, not on a device. Not with "fp8"."""
    prompts_ahead: bool = False
    """On CUDA, also start steps with prompts before the results of the previous step are read, and replay their sampling. Changes no
    answer. Off because it was tested on a CPU only, not on a device."""
    num_real_tokens: int | None = None
    """Ids from here to the end of the vocabulary are padding rows of the matrix and are never sampled. None = no padding."""
    grammar_cache_bytes: int = 64 * 1024 * 1024
    """Memory for compiled grammars (structured output, tools) that each sampling rank keeps for later requests."""
    collective_timeout_s: float = 1800.0
    """How long a rank waits for the others, also during loading. The replica notices the death of a rank much earlier."""

    def __post_init__(self) -> None:
        for name in ("num_threads", "kv_cache_bytes", "max_context_tokens", "num_real_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.grammar_cache_bytes < 0:
            raise ValueError(f"grammar_cache_bytes must not be negative, got {self.grammar_cache_bytes}")
        if self.redundant_experts < 0:
            raise ValueError(f"redundant_experts must not be negative, got {self.redundant_experts}")
        if self.collective_timeout_s <= 0:
            raise ValueError(f"collective_timeout_s must be positive, got {self.collective_timeout_s}")
        if self.kv_memory_fraction is not None and not 0 < self.kv_memory_fraction <= 1:
            raise ValueError(f"kv_memory_fraction must be above 0 and at most 1, got {self.kv_memory_fraction}")


def draft_model_of(engine_config: EngineConfig, runner_config: RunnerConfig) -> str | None:
    """The draft model; None: no draft model is used.

    Raises:
        ValueError: only one of the two settings asks for a draft model.
    """
    wants, source = engine_config.speculate == "draft", runner_config.draft_model
    if wants and source is None:
        raise ValueError("engine.speculate is draft and there is no runner.draft_model; name a small model of the same vocabulary")
    if source is not None and not wants:
        raise ValueError(f"runner.draft_model is {source} and engine.speculate is {engine_config.speculate}; set that to draft")
    return source
