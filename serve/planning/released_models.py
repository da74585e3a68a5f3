"""Shapes of the released Qwen2 and Qwen2.5 models, for planning without a checkpoint.

From each repository's config.json and the reports (arXiv 2407.10671, table 1; 2412.15115, table 1). Qwen2.5 has Qwen2's architecture in
more sizes; sizes that exist in both have the same shape. All have biases on q, k and v, and no sliding window.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from serve.planning.errors import PlanError
from serve.planning.formats import BF16, STORED_INT4, STORED_INT4_ZEROS, STORED_INT8, Format
from serve.planning.shape import ModelShape, MoeShape, shape_of_checkpoint

BASE_CONTEXT, INSTRUCT_CONTEXT, MATH_CONTEXT = 131_072, 32_768, 4_096
PADDED_72B = 29_696
"""The quantised releases of 72B pad its 29,568 inner features, so that groups of 128 divide over eight ranks."""

SIZES = {
    "0.5B": ModelShape(
        name="Qwen2-0.5B", vocab_size=151_936, hidden_size=896, intermediate_size=4_864, num_layers=24,
        num_heads=14, num_kv_heads=2, head_dim=64, max_context_tokens=BASE_CONTEXT, tied_embeddings=True,
    ),
    "1.5B": ModelShape(
        name="Qwen2-1.5B", vocab_size=151_936, hidden_size=1_536, intermediate_size=8_960, num_layers=28,
        num_heads=12, num_kv_heads=2, head_dim=128, max_context_tokens=BASE_CONTEXT, tied_embeddings=True,
    ),
    "3B": ModelShape(
        name="Qwen2.5-3B", vocab_size=151_936, hidden_size=2_048, intermediate_size=11_008, num_layers=36,
        num_heads=16, num_kv_heads=2, head_dim=128, max_context_tokens=INSTRUCT_CONTEXT, tied_embeddings=True,
    ),
    "7B": ModelShape(
        name="Qwen2-7B", vocab_size=152_064, hidden_size=3_584, intermediate_size=18_944, num_layers=28,
        num_heads=28, num_kv_heads=4, head_dim=128, max_context_tokens=BASE_CONTEXT, tied_embeddings=False,
    ),
    "14B": ModelShape(
        name="Qwen2.5-14B", vocab_size=152_064, hidden_size=5_120, intermediate_size=13_824, num_layers=48,
        num_heads=40, num_kv_heads=8, head_dim=128, max_context_tokens=BASE_CONTEXT, tied_embeddings=False,
    ),
    "32B": ModelShape(
        name="Qwen2.5-32B", vocab_size=152_064, hidden_size=5_120, intermediate_size=27_648, num_layers=64,
        num_heads=40, num_kv_heads=8, head_dim=128, max_context_tokens=BASE_CONTEXT, tied_embeddings=False,
    ),
    "57B-A14B": ModelShape(
        name="Qwen2-57B-A14B", vocab_size=151_936, hidden_size=3_584, intermediate_size=18_944, num_layers=28,
        num_heads=28, num_kv_heads=4, head_dim=128, max_context_tokens=BASE_CONTEXT, tied_embeddings=False,
        moe=MoeShape(num_experts=64, experts_per_token=8, expert_intermediate_size=2_560, shared_intermediate_size=20_480),
    ),
    "72B": ModelShape(
        name="Qwen2-72B", vocab_size=152_064, hidden_size=8_192, intermediate_size=29_568, num_layers=80,
        num_heads=64, num_kv_heads=8, head_dim=128, max_context_tokens=BASE_CONTEXT, tied_embeddings=False,
    ),
}  # fmt: skip
"""Shape by size; named after the first family that has the size, with the context of that family's base model."""

FAMILIES: Mapping[str, Mapping[str, int]] = {
    "Qwen2": dict.fromkeys(("0.5B", "1.5B", "7B", "57B-A14B", "72B"), BASE_CONTEXT),
    "Qwen2.5": {"0.5B": INSTRUCT_CONTEXT, "1.5B": BASE_CONTEXT, "3B": INSTRUCT_CONTEXT}
    | dict.fromkeys(("7B", "14B", "32B", "72B"), BASE_CONTEXT),
    "Qwen2.5-Coder": dict.fromkeys(("0.5B", "1.5B", "3B", "7B", "14B", "32B"), INSTRUCT_CONTEXT),
    "Qwen2.5-Math": dict.fromkeys(("1.5B", "7B", "72B"), MATH_CONTEXT),
}
"""Sizes of each family, and the base model's context. An Instruct model's context is the same, but at most `INSTRUCT_CONTEXT`."""

NAME = re.compile(
    r"(?:hf://|modelscope://)?(?:Qwen/)?(?P<family>Qwen2(?:\.5(?:-Coder|-Math)?)?)-"
    r"(?P<size>[\w.-]+?)(?P<instruct>-Instruct)?(?P<format>-GPTQ-Int4|-GPTQ-Int8|-AWQ)?"
)
STORED: dict[str | None, Format] = {None: BF16, "-GPTQ-Int4": STORED_INT4, "-AWQ": STORED_INT4_ZEROS, "-GPTQ-Int8": STORED_INT8}


def released_names() -> Iterator[str]:
    """Names of all base and Instruct models, without owner."""
    for family, sizes in FAMILIES.items():
        for size in sizes:
            yield from (f"{family}-{size}", f"{family}-{size}-Instruct")


def find_shape(model: str) -> ModelShape:
    """The shape of a model given as checkpoint folder, config.json, or release name such as ``Qwen2-57B-A14B-Instruct`` or
    ``Qwen/Qwen2.5-7B``.

    Raises:
        PlanError: it is none of these.
    """
    path = Path(model).expanduser()
    if path.exists():
        return shape_of_checkpoint(path, name=str(path.parent if path.is_file() else path))
    found = NAME.fullmatch(model)
    if found is None or found["size"] not in FAMILIES[found["family"]]:
        released = "; ".join(f"{family} in {', '.join(sizes)}" for family, sizes in FAMILIES.items())
        raise PlanError(
            f"{model!r} is neither a folder here nor a released size; give a checkpoint folder, its config.json, or a name like "
            f"Qwen2-57B-A14B, also with -Instruct: {released}"
        )
    context, format = FAMILIES[found["family"]][found["size"]], STORED[found["format"]]
    shape, padded = SIZES[found["size"]], found["size"] == "72B" and format is not BF16
    return dataclasses.replace(
        shape,
        name=model if "/" in model else f"Qwen/{model}",
        intermediate_size=PADDED_72B if padded else shape.intermediate_size,
        max_context_tokens=min(context, INSTRUCT_CONTEXT) if found["instruct"] else context,
        format=format,
    )
