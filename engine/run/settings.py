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
    """How a rank computes and how much it may hold. The same on every rank of a replica."""

    device: str = "auto"
    """"auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:<index>"."""
    dtype: DtypeName = "auto"
    """Of activations and KV, on CUDA of weights too. "auto": bfloat16 on CUDA; on CPUs float32 (without our kernels bfloat16, where it is
    multiplied natively), and a product there rounds its other side as well where the processor multiplies that: to bfloat16 beside weights
    stored so, to 8 bits beside quantised ones. "float32" never rounds activations."""
    quantize: QuantizeName | None = None
    """Round the weights while loading: "int8" a scale to 128 numbers, "int4" one to 32 (embedding and head stay int8); on GPUs from Ada
    on also "fp8", weights and activations, which their matrix units multiply (embedding and head stay as they are). A half or a
    quarter of the memory of bfloat16, and up to so much faster. None = as they are stored."""
    kv_dtype: KvDtypeName = "auto"
    """In which keys and values are held. "auto": as they are computed, in bfloat16 on CPUs that multiply it where `dtype` lets products
    round; "fp8" (e4m3, on GPUs): half of bfloat16's memory and traffic, so
    that twice as many tokens fit, each key and value rounded to three bits of mantissa."""
    num_threads: int | None = None
    """Threads that torch may use in this process. None = the host's physical cores shared evenly by its ranks."""
    kv_cache_bytes: int | None = None
    """Memory for K and V on each rank. None = `kv_memory_fraction` decides."""
    kv_memory_fraction: float | None = None
    """On CUDA the fraction of the device's memory that weights, activations and KV together may fill (None = 0.9); on a CPU
    the fraction of the memory still free after loading that KV may fill, all ranks on the host together (None = 0.3, at most
    4 GiB). Each of the replicas that Ray may place there at once takes an equal part of it: they are counted by their CPUs."""
    max_context_tokens: int | None = None
    """Prompt and answer together: lowers what the model itself takes, and is refused above it. None = the model's own limit."""
    attention_backend: BackendName = "auto"
    """"auto" takes our own kernels for the device. "flashinfer", on CUDA where `flashinfer-python` is installed, computes prompts by
    FlashInfer; not with keys and values in FP8, nor where ranks share heads unevenly."""
    dispatch: DispatchChoice = "auto"
    """How tokens reach routed experts on other ranks. "local": every rank sees all tokens of the stage and one sum follows, the least
    latency; "all_to_all": each token travels to the ranks of its experts alone, the least traffic. "auto": local where all ranks of
    a stage are on one host, else all_to_all."""
    redundant_experts: int = 0
    """Routed experts of each layer that every ep position holds beyond its even share, so that the busiest ones are held several times.
    Costs their memory: 64 experts over 16 positions are 4 each; with 1 redundant, 5."""
    draft_model: str | None = None
    """With `engine.speculate: draft` the model that guesses: a folder that is there on every host, a repository, or a URL, as
    `model.source` takes them. Small, and of the same vocabulary, as Qwen2-0.5B is for Qwen2-7B and Qwen2-72B. The rank of each shard
    that samples holds it whole, rounded as `quantize` says, with KV of its own in the memory for KV."""
    cuda_graphs: bool = True
    """On CUDA, record a step that only decodes for some numbers of sequences at the start, and replay it: a small model's step is launches
    more than anything else. Costs seconds of the start and some memory; no answer changes by it. False = launch every step anew."""
    prompt_graphs: bool = False
    """With `cuda_graphs`, replay the steps with prompts of up to 1,024 tokens too, in pieces between which attention is launched. Shown on
    a CPU; not yet run on a device: that is why it is off."""
    quick_launches: bool = False
    """On CUDA, launch kernels by what an earlier launch of the same kind found out, and not by Triton's own way, which takes twice to three
    times as long on the host. No answer changes by it. Run on a device for two kernels, not yet for whole models: that is why it is off."""
    symmetric_memory: bool = True
    """On CUDA, ranks of one host add up through memory that all their devices map, in one kernel for the little that a decoding step adds
    up (torch's symmetric memory). It is tried at the start, and NCCL takes its place where it cannot be had or a sum comes out wrong; the
    log says why. False = NCCL alone."""
    tune_tiles: bool = True
    """On CUDA, measure at the first start on a kind of device how products of rounded weights and of routed experts, and of plain ones with
    one or two rows, are computed and cut best, and keep that in the cache folder ($XDG_CACHE_HOME). Costs up to a minute once. Ways may
    differ by a rounding, as cuBLAS's own do."""
    early_launches: bool = False
    """On CUDA (Hopper), have kernels of steps of up to 64 tokens begin while the one before them ends, and fetch what they multiply by
    meanwhile. No answer changes by it. Run on a device for chains of products alone, not yet for whole models: that is why it is off."""
    prompts_ahead: bool = False
    """On CUDA, begin steps with prompts, too, before the step before is read, and replay what they sample. No answer changes by it. Shown
    on a CPU, not yet run on a device: that is why it is off."""
    num_real_tokens: int | None = None
    """Ids from here to the end of the vocabulary are padding rows of the matrix and are never sampled. None = no padding."""
    grammar_cache_bytes: int = 64 * 1024 * 1024
    """Compiled grammars (structured output, tools) that each sampling rank keeps for the next request that wants the same."""
    collective_timeout_s: float = 1800.0
    """How long a rank waits for the others, also while they load. Whoever owns the ranks notices a death much earlier."""

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
    """The model that guesses; None: none does.

    Raises:
        ValueError: only one of the two settings speaks of one.
    """
    wants, source = engine_config.speculate == "draft", runner_config.draft_model
    if wants and source is None:
        raise ValueError("engine.speculate is draft and there is no runner.draft_model; name a small model of the same vocabulary")
    if source is not None and not wants:
        raise ValueError(f"runner.draft_model is {source} and engine.speculate is {engine_config.speculate}; set that to draft")
    return source
