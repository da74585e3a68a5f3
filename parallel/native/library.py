"""Builds and loads the CPU kernels. ``python -m parallel.native.library`` compiles them once per machine, in about a minute.

``--all`` compiles them for every processor variant, next to the sources: for an image that is built on one machine and run on others.

The result is a plain shared library without torch's headers. Its functions take pointers and sizes, so it does not depend on torch's
ABI. It uses torch's threads: torch has loaded its OpenMP library already, and the loader reuses it.
"""

import argparse
import ctypes
import logging
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from parallel.cpp_build import Unavailable, compile_to
from parallel.native.tiles import may_use_tiles
from parallel.native.variants import FLAGS, PREBUILT, SOURCES, VARIANTS, built_path, built_variant, prebuilt_path, usable_variants
from parallel.user_cache import in_use, remove_unused

logger = logging.getLogger(__name__)

UNUSED_S = 30 * 86_400.0
"""Kernels in the user's cache that were not loaded for this long are removed when others are built: every version of the sources, and so
every update of Manta, has its own."""
HOW_TO_BUILD = "run `python -m parallel.native.library` once on this machine"
KINDS = ("bf16", "fp32", "int8", "int4", "int4_zeros")
_INTEGER_DOTS = ("int8_dot", "int4_dot", "int4_zeros_dot")
_ALL_DOTS = ("bf16_dot", *_INTEGER_DOTS)
DOT_KINDS = {"amx": _ALL_DOTS, "avx512_bf16": _ALL_DOTS, "avx512_vnni": _INTEGER_DOTS}
"""Additional kinds of a variant, which quantise rows as well: the processor multiplies two or four such numbers per 32-bit lane."""


class Native:
    """The loaded library. Its functions take addresses and sizes and check nothing: call them through the modules of this package."""

    def __init__(self, path: Path, variant: str) -> None:
        self.variant = variant
        if variant == "amx" and not may_use_tiles():
            raise Unavailable("Linux refuses AMX tiles to this process")
        self._library = ctypes.CDLL(str(path))
        self.lanes: int = self._library.manta_lanes()
        self.kinds = (*KINDS, *DOT_KINDS.get(variant, ()))
        size, address, number = ctypes.c_long, ctypes.c_void_p, ctypes.c_float
        threads = ctypes.c_int
        self.linear = {kind: self._function(f"linear_{kind}", [address] * 5 + [size] * 5 + [threads]) for kind in self.kinds}
        rows = [*[address] * 4, *[size] * 5, threads]
        self.rows = {kind: self._function(f"rows_{kind}", rows, size) for kind in self.kinds}
        experts = [address, size, address, address, size, *[address] * 7, *[size] * 5, threads]
        self.experts = {kind: self._function(f"experts_{kind}", experts) for kind in self.kinds}
        self.hadamard = self._function("hadamard", [address, size, threads, threads]) if "int8_dot" in self.kinds else None
        screens = {"bf16_dot", "int8_dot"} <= set(self.kinds)
        self.screen_of = self._function("screen_of", [*[address] * 4, *[size] * 3, threads]) if screens else None
        self.screened = self._function("screened", [*[address] * 9, *[size] * 9, threads], size) if screens else None
        self.choose_scales = self._function("choose_scales", [*[address] * 3, size, threads])
        self.add_norm = self._function("add_norm", [*[address] * 4, size, size, number, threads])
        self.gate = self._function("gate", [address, address, size, size, threads])
        self.rotate = self._function("rotate", [address, size, *[address] * 3, *[size] * 3, threads])
        self.highest = self._function("highest", [address, size, address, address, size, size, threads])
        self.candidates = self._function("candidates", [address, size, address, address, *[size] * 4, threads])
        self.draw = self._function("draw", [address, size, address, address, size, size, threads])
        suffixes = {torch.float32: "", **({torch.bfloat16: "_bf16"} if "bf16_dot" in self.kinds else {})}
        write_kv = [address, address, size, size, *[address] * 3, size, size, threads]
        self.write_kv = {dtype: self._function(f"write_kv{suffix}", write_kv) for dtype, suffix in suffixes.items()}
        prefill, decode = [*[address] * 8, *[size] * 6, threads], [*[address] * 7, *[size] * 6, threads]
        self.prefill = {dtype: self._function(f"prefill{suffix}", prefill) for dtype, suffix in suffixes.items()}
        self.decode = {dtype: self._function(f"decode{suffix}", decode) for dtype, suffix in suffixes.items()}
        self.attention_sublayer = self._function("attention_sublayer", [address] * 5 + [threads])
        self.mlp_sublayer = self._function("mlp_sublayer", [*[address] * 4, size, threads])
        self.moe_sublayer = self._function("moe_sublayer", [*[address] * 4, size, threads], size)
        self.layers = self._function("layers", [address, size, *[address] * 4, size, threads], size)
        self.weighted_experts = self._function("weighted_experts", [*[address] * 5, size, size, threads], size)
        sums = {dtype: f"all_reduce_{str(dtype).removeprefix('torch.')}" for dtype in (torch.float32, torch.bfloat16, torch.float16)}
        self.all_reduce = {dtype: self._function(name, [address, address, size], threads) for dtype, name in sums.items()}
        self.all_gather = self._function("all_gather", [address, address, address, size, address], threads)
        self.all_to_all = self._function("all_to_all", [address] * 5, threads)
        self.leave = self._function("leave", [address])

    def __repr__(self) -> str:
        return f"<Native {self.variant}>"

    def _function(self, name: str, arguments: Sequence[type], result: type | None = None) -> "ctypes._NamedFuncPointer":
        function: ctypes._NamedFuncPointer = getattr(self._library, f"manta_{name}")
        function.argtypes, function.restype = arguments, result
        return function


@cache
def native() -> Native | None:
    """The kernels for this processor, or None, with the reason in the log."""
    try:
        if (variant := built_variant()) is None:
            raise Unavailable(f"they are not built; {HOW_TO_BUILD}")
        if variant != (best := usable_variants()[0]):
            logger.warning("using the CPU kernels for %s, as those for %s are not built; %s", variant, best, HOW_TO_BUILD)
        path = built_path(variant)
        with in_use(path):
            library = Native(path, variant)
    except (Unavailable, OSError) as reason:
        logger.info("computing without our own CPU kernels: %s", reason)
        return None
    return library


def address_of(function: "ctypes._NamedFuncPointer") -> int | None:
    """A function pointer to pass to another kernel."""
    return ctypes.cast(function, ctypes.c_void_p).value


def available_kinds() -> frozenset[str]:
    """The weight kinds with kernels on this machine; empty without a library."""
    library = native()
    return frozenset(library.kinds if library else ())


def has_kernel(kind: str) -> bool:
    """Whether this machine has kernels for this weight kind."""
    return kind in available_kinds()


def build(variant: str | None = None) -> Path:
    """Compile the kernels for this processor (or the given variant) unless they are built already. If the compiler does not support the
    processor's newest instructions, the next lesser variant is built.

    Raises:
        Unavailable: what is missing on this machine, or the compiler's output for the last variant.
    """
    *better, last = (variant,) if variant else usable_variants()
    for each in better:
        try:
            return _compiled(each)
        except Unavailable as reason:
            logger.warning("the kernels for %s could not be built, a slower variant is: %s", each, reason)
    return _compiled(last)


def build_all() -> list[Path]:
    """Compile every variant, next to the sources.

    Raises:
        Unavailable: what is missing on this machine, or the compiler's output.
    """
    return [_compiled(variant, prebuilt_path(variant)) for variant in VARIANTS]


def _compiled(variant: str, target: Path | None = None) -> Path:
    path = target or built_path(variant)
    is_new = not path.exists()
    built = compile_to(path, sorted(SOURCES.glob("*.cpp")), (*FLAGS, *VARIANTS[variant]))
    if is_new and target is None:
        remove_unused(path.parent.parent, keep=path.parent, unused_s=UNUSED_S)
    return built


def num_threads() -> int:
    """Number of threads a kernel may use: torch's setting for this process."""
    return torch.get_num_threads()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="for every processor, into parallel/native/built")
    wants_all = parser.parse_args().all
    if wants_all and platform.machine() != "x86_64":
        print(f"The kernels are for x86-64, and this is {platform.machine()}: Manta works without them")
        PREBUILT.mkdir(exist_ok=True)
        return 0
    try:
        print(f"The CPU kernels are built: {', '.join(map(str, build_all() if wants_all else [build()]))}")
    except Unavailable as reason:
        print(f"Not built: {reason}\nManta works without them; on a CPU it is then several times slower.")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
