"""Compiles every kernel for a GPU that need not be there: `python -m tests.parallel.cuda.compile_kernels [--all] [CAPABILITY]`.

CAPABILITY is 90 (Hopper) if nothing is said, or that of another: 75 (Turing, in float16), 80 (A100), 86, 89 (Ada), 100, 120. What a kind of
device does not multiply is left out: FP8 before Ada.

Prints a line per kernel: name, bytes of its binary, shared memory it takes, in how many places it loads one byte, in how many it reads or
writes before it has waited for the last launch (see `parallel.cuda.dependent_launch`), and in how many its threads wait for each other.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from parallel.cuda import (
    autotune,
    decode_inputs,
    elementwise,
    expert_sort,
    gated_gemv,
    gemv,
    grouped_gemm,
    logit_keys,
    logits_processing,
    matmul,
    noise,
    paged_attention,
    paged_decode,
    paged_prefill,
    quantised_matmul,
    routing,
    sampling,
    sampling_full_vocab,
    sampling_top_p,
    scale_search,
    swap_ab,
)
from parallel.quantisation import FP8, FP8_MAX

CAPABILITY = next((int(word) for word in sys.argv[1:] if word.isdigit()), 90)
TARGET = GPUTarget("cuda", CAPABILITY, 32)
HAS_BFLOAT16, HAS_FP8, HAS_PDL = CAPABILITY >= 80, CAPABILITY >= 89, CAPABILITY >= 90
SHARED_BYTES = 1024 * {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[CAPABILITY]
"""Shared memory per program (CUDA programming guide, "compute capabilities")."""
CACHE = {"keys": "*bf16", "values": "*bf16", "tables": "*i32", "lengths": "*i32", "first_head": "*i32", "num_heads_of": "*i32"}
STRIDES = dict.fromkeys(("table_stride", "q_token_stride", "block_stride", "token_stride", "head_stride", "num_heads", "parts"), "i32")
ATTENTION = {"q": "*bf16", "out": "*bf16", **CACHE, "scale_log2": "fp32", **STRIDES}
PLACES = {"tile_sequence": "*i32", "tile_token": "*i32", "query_starts": "*i32"}
SEQUENCES = {"sequences": "*i32", "query_starts": "*i32"}
SIZES = {"HEAD_DIM": 128, "PADDED_DIM": 128, "BLOCK_TOKENS": 16, "PRECISION": "tf32"}
PARTS = {"part_out": "*fp32", "part_lse": "*fp32"}
DECODE_TILE = paged_decode.decode_tile(128, torch.bfloat16, 64, SHARED_BYTES)
FP8_DECODE_TILE = paged_decode.decode_tile(128, FP8, 64, SHARED_BYTES)
DECODE = {"PADDED_ROWS": 16, "IN_ASSEMBLY": True, "TOKENS": 1}
FEW_TILE = paged_decode.multi_token_tile(128, torch.bfloat16, SHARED_BYTES)
FEW = {"PADDED_ROWS": paged_decode.FEW_ROWS, "IN_ASSEMBLY": True, "TOKENS": paged_decode.FEW_ROWS // 7, "TILE": FEW_TILE.positions}
DECODE_OPTIONS = {"num_warps": DECODE_TILE.num_warps, "num_stages": DECODE_TILE.num_stages}
PREFILL_TILE = paged_prefill.prefill_tile(128, torch.bfloat16, SHARED_BYTES)
PREFILL = {"TOKENS": PREFILL_TILE.rows // 7, "TILE": PREFILL_TILE.positions, "ROWS": PREFILL_TILE.rows}
PREFILL_OPTIONS = {"num_warps": PREFILL_TILE.num_warps, "num_stages": PREFILL_TILE.num_stages}
NUMBERS = {"int8": "*i8", "int4": "*u8", "int4_zeros": "*u8", "fp8": "*fp8e4nv"}
SCALES = {"int8": "*fp16", "int4": "*fp16", "int4_zeros": "*i32", "fp8": "*fp32"}
ROUNDING = {"MOST": FP8_MAX, "BLOCK": quantised_matmul.FP8_BLOCK}

PARTED = {"PARTS": 64, "PART": logit_keys.PART}
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}
CUTTING = {"CUTS": sampling_top_p.CUTS}
DRAWING = (
    dict.fromkeys(("width", "readable", "row_stride", "num_parts", "num_rows", "number"), "i32")
    | dict.fromkeys(("highest_of_stretches", "highest_of_parts", "raw_highest_of_parts", "stretches", "ids_of", "keys_of"), "*i32")
    | dict.fromkeys(("temperatures", "top_ps", "min_ps", "uniforms"), "*fp64")
    | dict.fromkeys(("kinds", "seeds", "choices", "positions", "top_ks", "chosen", "raw_is_sound", "is_sound", "is_decided"), "*i64")
    | dict.fromkeys(("weights_of_parts", "brackets", "sums", "kept"), "*i64")
)

ALL_TILES = "--all" in sys.argv
"""Else only those used without measuring."""
IS_WIDE = ALL_TILES or CAPABILITY != 90
"""Whether attention is compiled for heads of 64 and in float32 as well."""


def _sizes(tile: autotune.Tile) -> dict[str, Any]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns}


def _wanted(*choices: Sequence[autotune.Tile]) -> list[autotune.Tile]:
    return [tile for some in choices for tile in (some if ALL_TILES else some[:1])]


Kernel = tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]
OTHER_ATTENTION = ((64, torch.bfloat16), (64, torch.float32), (128, torch.float32))


def _of_dtype(head_dim: int, dtype: torch.dtype) -> tuple[dict[str, str], dict[str, Any]]:
    name = "*fp32" if dtype == torch.float32 else "*bf16"
    sizes = SIZES | {"HEAD_DIM": head_dim, "PADDED_DIM": head_dim, "PRECISION": paged_attention.dot_precision(dtype)}
    return ATTENTION | dict.fromkeys(("q", "out", "keys", "values"), name), sizes


def _prefilling(head_dim: int, dtype: torch.dtype) -> Kernel:
    types, sizes = _of_dtype(head_dim, dtype)
    tile = paged_prefill.prefill_tile(head_dim, dtype, SHARED_BYTES)
    constants = {"TOKENS": tile.rows // 7, "TILE": tile.positions, "ROWS": tile.rows, "CAUSAL": True, "IN_FLOAT16": False}
    return paged_prefill._prefill_kernel, types | PLACES, sizes | constants, {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _decoding(head_dim: int, dtype: torch.dtype, parts: int) -> Kernel:
    types, sizes = _of_dtype(head_dim, dtype)
    tile = paged_decode.decode_tile(head_dim, dtype, parts, SHARED_BYTES)
    constants = DECODE | {"IN_PAIRS": False, "TILE": tile.positions}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return paged_decode._decode_kernel, types | PARTS | SEQUENCES, sizes | constants, options


def _decoding_few(head_dim: int, dtype: torch.dtype) -> Kernel:
    types, sizes = _of_dtype(head_dim, dtype)
    tile = paged_decode.multi_token_tile(head_dim, dtype, SHARED_BYTES)
    constants = FEW | {"IN_PAIRS": False, "TILE": tile.positions}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return paged_decode._decode_kernel, types | PARTS | SEQUENCES, sizes | constants, options


ATTENTIONS = (_prefilling, *(partial(_decoding, parts=parts) for parts in (1, 8, 64)), _decoding_few)

KERNELS: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = [
    (
        paged_decode._decode_kernel,
        ATTENTION | PARTS | SEQUENCES,
        SIZES | DECODE | {"IN_PAIRS": False, "TILE": DECODE_TILE.positions},
        DECODE_OPTIONS,
    ),
    (
        paged_decode._decode_kernel,
        ATTENTION | PARTS | SEQUENCES | {"keys": "*u16", "values": "*u16"},
        SIZES | DECODE | {"IN_PAIRS": True, "TILE": FP8_DECODE_TILE.positions},
        {"num_warps": FP8_DECODE_TILE.num_warps, "num_stages": FP8_DECODE_TILE.num_stages},
    ),
    *(
        (
            paged_decode._decode_kernel,
            ATTENTION | PARTS | SEQUENCES | {"keys": kv, "values": kv},
            SIZES | FEW | {"IN_PAIRS": kv == "*u16"},
            {"num_warps": FEW_TILE.num_warps, "num_stages": FEW_TILE.num_stages},
        )
        for kv in (("*bf16", "*u16") if IS_WIDE else ("*bf16",))
    ),
    *(_attention(head_dim, dtype) for head_dim, dtype in OTHER_ATTENTION for _attention in ATTENTIONS if IS_WIDE),
    *(
        (paged_prefill._prefill_kernel, ATTENTION | PLACES, SIZES | PREFILL | {"CAUSAL": causal, "IN_FLOAT16": False}, PREFILL_OPTIONS)
        for causal in (True, False)
    ),
    (
        paged_prefill._prefill_kernel,
        ATTENTION | PLACES | {"keys": "*fp8e4nv", "values": "*fp8e4nv"},
        SIZES | PREFILL | {"CAUSAL": True, "IN_FLOAT16": True},
        PREFILL_OPTIONS,
    ),
    *(
        (
            paged_decode._merge_kernel,
            PARTS | SEQUENCES | {"out": "*bf16", "lengths": "*i32", "num_heads": "i32"},
            {"HEAD_DIM": 128, "PADDED_DIM": 128, "TILE": DECODE_TILE.positions, "PARTS": 64, "TOKENS": tokens},
            {"num_warps": paged_decode.merge_warps(64 * 128)},
        )
        for tokens in ((1, 9) if IS_WIDE else (1,))
    ),
    (
        routing._select_experts_kernel,
        {"logits": "*bf16", "ids": "*i64", "weights": "*bf16", "num_experts": "i32"},
        {"PER_TOKEN": 8, "RENORMALISE": False, "PADDED": 64, "PLACES": 8},
        {"num_warps": 1},
    ),
    (
        routing._add_shared_kernel,
        {"routed": "*bf16", "gates": "*bf16", "shared": "*bf16", "out": "*bf16", "width": "i32"},
        {"BLOCK": routing.ADD_BLOCK},
        {"num_warps": 4},
    ),
    (
        elementwise._rms_norm_kernel,
        {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32", "width": "i32"},
        {"HAS_RESIDUAL": True, "WIDTH": 4096},
        {"num_warps": 8},
    ),
    (
        elementwise._swiglu_kernel,
        {"gate_up": "*bf16", "out": "*bf16", "width": "i32", "row_stride": "i32"},
        {"BLOCK": elementwise.SWIGLU_BLOCK},
        {"num_warps": 4},
    ),
    *(
        (
            elementwise._rope_and_write_kv_kernel,
            {"heads": "*bf16", "cos": "*bf16", "sin": "*bf16", "slots": "*i64", "q_out": "*bf16", "keys": kv, "values": kv}
            | dict.fromkeys(("row_stride", "num_heads", "num_kv_heads", "token_stride", "head_stride"), "i32"),
            {"HALF": 64, "PADDED_HALF": 64, "KV_IN_FP8": kv != "*bf16", "MOST": FP8_MAX},
            {"num_warps": 1},
        )
        for kv in ("*bf16", "*fp8e4nv")
    ),
    (
        noise._uniform_kernel,
        {"seeds": "*i64", "choices": "*i64", "positions": "*i64", "out": "*fp64", "num_rows": "i32", "stream": "i32"},
        {"BLOCK": noise.BLOCK},
        {"num_warps": 4},
    ),
    (
        decode_inputs._decode_inputs_kernel,
        dict.fromkeys(("given", "sampled", "tokens", "slots"), "*i64")
        | dict.fromkeys(("lengths", "tables"), "*i32")
        | dict.fromkeys(("num_rows", "given_stride", "table_stride"), "i32"),
        {"BLOCK_TOKENS": 16, "BLOCK": decode_inputs.BLOCK},
        {"num_warps": 4},
    ),
    *(
        (
            sampling_full_vocab._draw_kernel,
            {
                "logits": logits,
                "top_ks": "*i64",
                "decided": "*i64",
                "chosen": "*i64",
                "width": "i32",
                "readable": "i32",
                "row_stride": "i32",
            }
            | dict.fromkeys(("temperatures", "top_ps", "min_ps", "uniforms"), "*fp64"),
            {"BLOCK": sampling_full_vocab.BLOCK, "SHIFT": logit_keys.key_shift(DTYPES[logits])},
            {"num_warps": 8, "enable_fp_fusion": False},
        )
        for logits in ("*bf16", "*fp32")
    ),
    *(
        (kernel, DRAWING | {"logits": logits}, PARTED | constants, {"num_warps": 8, "enable_fp_fusion": False})
        for logits in ("*bf16", "*fp32")
        for kernel, constants in (
            (sampling._stretches_kernel, {"STRETCH": sampling.STRETCH}),
            (sampling._weights_kernel, {}),
            *((sampling._rows_kernel, sampling.SIZES | {"MOST": most, "STRETCHES": 2048}) for most in (0, 1, 3)),
            *((kernel, CUTTING | {"SHIFT": logit_keys.key_shift(DTYPES[logits])}) for kernel in sampling_top_p.KERNELS),
        )
    ),
    (
        logits_processing._count_tokens_kernel,
        dict.fromkeys(("entries", "tokens", "starts", "known"), "*i64") | {"counts": "*i32", "num_rows": "i32", "width": "i32"},
        {"ROWS": logits_processing.ROWS},
        {"num_warps": 4},
    ),
    (
        logits_processing._process_logits_kernel,
        {
            "logits": "*bf16",
            "out": "*fp32",
            "raw_highest": "*i32",
            "entries": "*i64",
            "counts": "*i32",
            "penalties": "*fp32",
            "stop_ids": "*i64",
        }
        | {"num_stop_ids": "*i64", "stops_now": "*i64", "words": "*i32", "word_rows": "*i64"}
        | dict.fromkeys(("width", "readable", "row_stride", "out_stride", "num_words", "most_stop_ids"), "i32"),
        {"BLOCK": logit_keys.PART},
        {"num_warps": 8, "enable_fp_fusion": False},
    ),
    (
        logits_processing._bias_kernel,
        {
            "out": "*fp32",
            "entries": "*i64",
            "bias_ids": "*i64",
            "biases": "*fp32",
            "num_biases": "*i64",
            "out_stride": "i32",
            "most_biases": "i32",
        },
        {"BLOCK": logits_processing.BIASES},
        {"num_warps": 1},
    ),
    (
        quantised_matmul._quantise_fp8_kernel,
        {"x": "*bf16", "numbers": "*fp8e4nv", "scales": "*fp32", "width": "i32"},
        ROUNDING,
        {"num_warps": 32},
    ),
    (
        scale_search._choose_scales_kernel,
        {"weights": "*fp32", "numbers": "*i8", "scales": "*fp16", "num_groups": "i32"},
        scale_search.SIZES | {"GROUP": 32},
        {"num_warps": 4, "enable_fp_fusion": False},
    ),
    *(
        (
            quantised_matmul._matmul_kernel,
            {"x": "*fp8e4nv" if kind == "fp8" else "*bf16", "numbers": NUMBERS[kind], "scales": SCALES[kind], "x_scales": "*fp32"}
            | {"bias": "*bf16", "out": "*bf16"}
            | dict.fromkeys(("num_rows", "in_size", "padded_in_size", "out_size", "has_bias"), "i32"),
            {
                "KIND": kind,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "DEPTH": matmul.DEPTH[kind],
                "PRECISION": "tf32",
            },
            {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        )
        for kind in NUMBERS
        for tile in dict.fromkeys((*autotune.FALLBACK_TILES.values(), autotune.WITHOUT_LIBRARY))
    ),
    *(
        (
            swap_ab.swap_ab_kernel,
            {"x": "*fp8e4nv" if kind == "fp8" else "*bf16", "numbers": NUMBERS[kind] if kind == "fp8" else "*i16", "scales": SCALES[kind]}
            | {"x_scales": "*fp32", "bias": "*bf16", "out": "*bf16" if tile.parts == 1 else "*fp32"}
            | dict.fromkeys(("num_rows", "in_size", "row_size", "num_groups", "out_size", "has_bias", "num_parts"), "i32"),
            {
                "KIND": kind,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "DEPTH": swap_ab.SWAP_AB_DEPTH,
                "FAST": kind != "fp8",
                "PRECISION": "tf32",
                "WHOLE": tile.parts == 1,
            },
            {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        )
        for kind in NUMBERS
        for most in autotune.STAGES[kind]
        if CAPABILITY == 90 or most <= autotune.MAX_CUSTOM_ROWS  # with more rows nothing but cuBLAS is taken unmeasured
        for tile in _wanted(autotune.swap_ab_tiles(kind, most)[:2])  # more parts are the same to a compiler
    ),
    (
        swap_ab.split_k_sum_kernel,
        {"parts": "*fp32", "bias": "*bf16", "out": "*bf16", "num_rows": "i32", "out_size": "i32", "has_bias": "i32"},
        {"PARTS": 4, "BLOCK": quantised_matmul.SUM_BLOCK},
        {"num_warps": 4},
    ),
    *(
        (
            quantised_matmul._dequantise_kernel,
            {"numbers": NUMBERS[kind], "scales": SCALES[kind], "out": "*bf16"}
            | dict.fromkeys(("first", "in_size", "row_size", "num_groups"), "i32"),
            {"KIND": kind, "BLOCK": quantised_matmul.UNPACK_BLOCK},
            {"num_warps": 4},
        )
        for kind in ("int8", "int4", "int4_zeros")
    ),
    *(
        (
            grouped_gemm._grouped_gemm_kernel,
            {"x": "*fp8e4nv" if kind == "fp8" else "*bf16", "x_scales": "*fp32", "numbers_of": "*i64", "scales_of": "*i64"}
            | {"out": "*bf16", "row_weights": "*bf16", "assignments": "*i32", "experts": "*i32"}
            | dict.fromkeys(("num_assigned", "num_tiles", "rows_per_source", "in_size", "padded_in_size", "out_size"), "i32"),
            {
                "KIND": kind,
                "WEIGHTED": True,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "DEPTH": matmul.DEPTH[kind],
                "PRECISION": "tf32",
            },
            {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        )
        for kind in ("plain", *NUMBERS)
        for tile in _wanted(*grouped_gemm.TILES.values())
    ),
    *(
        (
            kernel,
            {"x": "*bf16", "numbers": NUMBERS.get(kind, "*bf16"), "scales": SCALES.get(kind, "*bf16"), "bias": "*bf16", "out": "*bf16"}
            | dict.fromkeys(("in_size", "stride", "out_size", "width", "has_bias"), "i32"),
            {"KIND": kind, "ROWS": tile.rows, "COLUMNS": tile.columns, "LANES": gemv.lanes(tile)},
            {"num_warps": tile.num_warps},
        )
        for kernel in (gemv._gemv_kernel, gated_gemv._gated_gemv_kernel)
        for kind in ("plain", "int8", "int4", "int4_zeros")
        for tile in _wanted(*gemv.CANDIDATES.values())
    ),
    (
        expert_sort._sort_kernel,
        {"held_ids": "*i64", "assignments": "*i32", "experts": "*i32", "num_assigned": "i32", "num_tiles": "i32", "num_held": "i32"},
        {"BINS": 128, "TILE_ROWS": 16, "BLOCK": expert_sort.BLOCK},
        {"num_warps": 4},
    ),
    (
        expert_sort._combine_kernel,
        {"y": "*bf16", "held_ids": "*i64", "out": "*bf16", "width": "i32"},
        {"PER_ROW": 8, "BLOCK": expert_sort.BLOCK},
        {"num_warps": 4},
    ),
]


def _asked_for() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """All kernels; of int4_zeros, which differs little from int4, one of each kernel."""
    seen = set()
    for kernel, types, constants, options in KERNELS:
        if ALL_TILES or constants.get("KIND") != "int4_zeros" or kernel.__name__ not in seen:
            yield kernel, types, constants, options
        if constants.get("KIND") == "int4_zeros":
            seen.add(kernel.__name__)


def main() -> int:
    for kernel, some_types, some_constants, options in _asked_for():
        if not HAS_FP8 and ("*fp8e4nv" in some_types.values() or some_constants.get("IN_PAIRS")):
            continue
        types = {name: kind if HAS_BFLOAT16 else kind.replace("bf16", "fp16") for name, kind in some_types.items()}
        constants = some_constants | ({"PDL": HAS_PDL} if "PDL" in kernel.arg_names else {})
        constants |= {"FAST": constants["FAST"] and HAS_BFLOAT16} if "FAST" in constants else {}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        missing = [name for name, kind in signature.items() if kind == "constexpr" and name not in constants]
        assert not missing, f"{kernel.__name__}: nobody says what {missing} are"
        # As at a launch with tensors and sizes of whole 16 bytes: only then are loads taken in ahead, through shared memory.
        whole = {
            (param.num,): [["tt.divisibility", 16]]
            for param in kernel.params
            if signature[param.name][0] in "*i" and not param.do_not_specialize and not param.do_not_specialize_on_alignment
        }
        wanted = {name: value for name, value in constants.items() if signature.get(name) == "constexpr"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=wanted, attrs=whole)
        compiled = triton.compile(source, target=TARGET, options=options)
        single = len(re.findall(r"ld\.global\S*\.b8\b", compiled.asm["ptx"]))
        before, _, _ = compiled.asm["ptx"].partition("griddepcontrol.wait") if constants.get("PDL") else ("", "", "")
        reads, writes = len(re.findall(r"\bld\.global", before)), len(re.findall(r"\b(?:st|atom|red)\.", before))
        print(
            f"{kernel.__name__} {len(compiled.asm['cubin'])} bytes, {compiled.metadata.shared} bytes shared, {single} of a byte, "
            f"{reads} read early, {writes} written early, {compiled.asm['ptx'].count('bar.sync')} barriers"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
