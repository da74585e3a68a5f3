"""The CPU kernels without AMX tiles, to compare those with tiles."""

import pytest

from parallel.cpp_build import Unavailable
from parallel.native.library import Native, build, native


def kernels_without_tiles() -> Native:
    """Built if need be, which takes a minute. The test is skipped where the kernels in use have no tiles, or there is no compiler."""
    library = native()
    if library is None or library.variant != "amx":
        pytest.skip("for a processor with AMX tiles")
    try:
        return Native(build("avx512_bf16"), "avx512_bf16")
    except Unavailable as reason:
        pytest.skip(str(reason))
