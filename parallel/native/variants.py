"""The variants of the CPU kernels, one for each kind of processor, and where they are once they are built. Does not import torch."""

import platform
from pathlib import Path

from parallel.cpp_build import Unavailable, cache_path, version_of
from parallel.native.tiles import may_use_tiles
from parallel.user_cache import default_cache_folder

SOURCES = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "built"
"""Kernels built in advance next to the sources (``--all``)."""
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
VARIANTS = {
    "amx": (*AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512_bf16": (*AVX512, "-mavx512vnni", "-mavx512bf16"),
    "avx512_vnni": (*AVX512, "-mavx512vnni"),
    "avx512": AVX512,
    "avx2": AVX2,
}
"""Best first, with the compiler flags."""


def usable_variants() -> tuple[str, ...]:
    """The `VARIANTS` that this processor supports, best first.

    Raises:
        Unavailable: none.
    """
    has = _capabilities()
    found: list[str] = []
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= has:
        if {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"} <= has and may_use_tiles():
            found.append("amx")
        if "avx512_vnni" in has:
            found += ["avx512_bf16", "avx512_vnni"] if "avx512_bf16" in has else ["avx512_vnni"]
        found.append("avx512")
    if {"avx2", "fma", "f16c"} <= has:
        found.append("avx2")
    if not found:
        raise Unavailable(f"they are for x86-64 with AVX2, which this {platform.machine()} has not")
    return tuple(found)


def built_variant() -> str | None:
    """The best variant that this processor supports among those that are built; None: none is built.

    Raises:
        Unavailable: the processor supports none.
    """
    return next((variant for variant in usable_variants() if built_path(variant).exists()), None)


def _capabilities() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def built_path(variant: str) -> Path:
    """Path of this variant's library: next to the sources if it was built in advance, else in the user's cache (perhaps not built yet).

    What was built before MANTA_CACHE was set is found as well.
    """
    cached = _library_path(variant, prebuilt=False)
    before = default_cache_folder() / "native" / cached.parent.name / cached.name
    return next((path for path in (prebuilt_path(variant), cached, before) if path.exists()), cached)


def prebuilt_path(variant: str) -> Path:
    """Path of this variant's library if it was built in advance."""
    return _library_path(variant, prebuilt=True)


def _library_path(variant: str, *, prebuilt: bool) -> Path:
    parts = [part.encode() for part in (platform.machine(), *FLAGS, *VARIANTS[variant])]
    parts += [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    version, file = version_of(parts), f"manta_{variant}.so"
    return PREBUILT / version / file if prebuilt else cache_path("native", version, file)
