"""Generate docs/layouts.md: the best layouts of released models on common GPU counts and memory sizes."""

import textwrap
from collections.abc import Iterator

from serve.planning.formats import BF16, FP8, INT4, Format
from serve.planning.hardware import Fleet, network, parse_gpus
from serve.planning.memory import Workload
from serve.planning.plan import Plan, PlanInputs, make_plan
from serve.planning.released_models import FAMILIES, SIZES
from serve.planning.render import shortened
from serve.planning.serving_limits import ServingLimit
from serve.planning.shape import ModelShape

GPU_COUNTS = (1, 2, 4, 8, 16)
MEMORIES = ("24G", "40G", "80G", "141G")
SHOWN_FORMATS = (BF16, FP8, INT4)
GPUS_OF_A_HOST = 8
NETWORK_GBIT = 100.0
WORKLOAD = Workload(context_tokens=8192, concurrency=64, step_tokens=2048)
COMMAND = "manta plan --table > docs/layouts.md"

ABOUT = (
    f"Written by `{COMMAND}`; a test compares. Do not edit.",
    "Each cell is the first choice of `manta plan` among the layouts that `manta serve` supports today, "
    f"for {WORKLOAD.concurrency} concurrent sequences of {WORKLOAD.context_tokens:,} tokens and steps of {WORKLOAD.step_tokens:,} tokens: "
    "the number of replicas x the layout of one, and the number of KV tokens that fit in all replicas together. "
    "`tp`, `pp`, `dp` and `ep` are tensor, pipeline, data and expert parallelism. "
    '"no": no layout fits the weights and one such sequence.',
    f"Up to {GPUS_OF_A_HOST} GPUs are on one host, 16 are on two. Memory is in units of 10^9 bytes; a tenth of it is kept free, "
    "and half a GiB each is reserved for CUDA and, with several ranks, for NCCL. "
    "KV is bfloat16; with FP8 (`--kv-dtype fp8`) about twice as many tokens fit.",
    "For other GPUs, workloads or formats, run `manta plan MODEL --gpus ...`; it also gives memory per rank and speed estimates.",
)


def layouts_page() -> str:
    """The whole page."""
    limits: dict[ServingLimit, None] = {}
    sections = [line for size, shape in SIZES.items() for line in _section(_title(size), shape, limits)]
    starred = [f"- {limit.sentence}." for limit in limits]
    about = [line for paragraph in ABOUT for line in ("", *textwrap.wrap(paragraph, 120))]
    served = ["", "A star marks a layout that exists but is not supported by `manta serve` yet:", "", *starred] if starred else []
    return "\n".join(["# Layouts: which Qwen2 or Qwen2.5 fits on which GPUs", *about, *served, *sections]) + "\n"


def _title(size: str) -> str:
    """All releases of this size that support the page's context length."""
    return ", ".join(f"{family}-{size}" for family, sizes in FAMILIES.items() if sizes.get(size, 0) >= WORKLOAD.context_tokens)


def _section(title: str, shape: ModelShape, limits: dict[ServingLimit, None]) -> Iterator[str]:
    yield from ("", f"## {title}", "")
    yield f"| GPUs | | {' | '.join(f'{memory[:-1]} GB' for memory in MEMORIES)} |"
    yield f"|---|---|{'---|' * len(MEMORIES)}"
    for count in GPU_COUNTS:
        for format in SHOWN_FORMATS:
            cells = (_cell(_plan(shape, count, memory, format), limits) for memory in MEMORIES)
            yield f"| {count} | {format.name} | {' | '.join(cells)} |"


def _plan(shape: ModelShape, count: int, memory: str, format: Format) -> Plan:
    per_host = min(count, GPUS_OF_A_HOST)
    _, gpu = parse_gpus(memory)
    fleet = Fleet(gpu=gpu, gpus_per_host=per_host, hosts=count // per_host, network=network(NETWORK_GBIT))
    return make_plan(PlanInputs(shape=shape, fleet=fleet, format=format, workload=WORKLOAD))


def _cell(plan: Plan, limits: dict[ServingLimit, None]) -> str:
    if not plan.layouts:
        return "no"
    best = plan.first_served() or plan.layouts[0]
    limits.update(dict.fromkeys(best.limits))
    replicas = f"{best.placement.replicas} x " if best.placement.replicas > 1 else ""
    return f"{replicas}{best.topology}: {shortened(best.total_kv_tokens)}{'' if best.is_served_today else ' *'}"
