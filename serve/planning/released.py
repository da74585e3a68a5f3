"""The released sizes of Qwen2 (arXiv 2407.10671, table 1, and each repository's config.json), for planning without a checkpoint."""

import dataclasses
import re
from pathlib import Path

from serve.planning.errors import PlanError
from serve.planning.formats import BF16, STORED_INT4, STORED_INT8, Format
from serve.planning.shape import ModelShape, MoeShape, shape_of_checkpoint

BASE_CONTEXT, INSTRUCT_CONTEXT = 131_072, 32_768
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
    "7B": ModelShape(
        name="Qwen2-7B", vocab_size=152_064, hidden_size=3_584, intermediate_size=18_944, num_layers=28,
        num_heads=28, num_kv_heads=4, head_dim=128, max_context_tokens=BASE_CONTEXT, tied_embeddings=False,
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

NAME = re.compile(
    r"(?:hf://|modelscope://)?(?:Qwen/)?Qwen2-(?P<size>[\w.-]+?)(?P<instruct>-Instruct)?(?P<format>-GPTQ-Int4|-GPTQ-Int8|-AWQ)?"
)
STORED: dict[str | None, Format] = {None: BF16, "-GPTQ-Int4": STORED_INT4, "-AWQ": STORED_INT8, "-GPTQ-Int8": STORED_INT8}


def find_shape(model: str) -> ModelShape:
    """A checkpoint folder, a config.json, or the name of a release such as ``Qwen2-57B-A14B-Instruct`` or ``Qwen/Qwen2-7B``.

    Raises:
        PlanError: it is neither.
    """
    path = Path(model).expanduser()
    if path.exists():
        return shape_of_checkpoint(path, name=str(path.parent if path.is_file() else path))
    found = NAME.fullmatch(model)
    if found is None or found["size"] not in SIZES:
        raise PlanError(
            f"{model!r} is neither a folder here nor a released size; give a checkpoint folder, its config.json, or one of "
            f"{', '.join(shape.name for shape in SIZES.values())}, each also with -Instruct"
        )
    shape, format = SIZES[found["size"]], STORED[found["format"]]
    padded = found["size"] == "72B" and format is not BF16
    return dataclasses.replace(
        shape,
        name=model if "/" in model else f"Qwen/{model}",
        intermediate_size=PADDED_72B if padded else shape.intermediate_size,
        max_context_tokens=INSTRUCT_CONTEXT if found["instruct"] else shape.max_context_tokens,
        format=format,
    )
