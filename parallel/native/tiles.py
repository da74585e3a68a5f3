"""Permission to use AMX tiles, which Linux gives to a process that asks for it (Documentation/arch/x86/xstate.rst)."""

import ctypes
import platform
import sys
from functools import cache

_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@cache
def may_use_tiles() -> bool:
    """Ask for the permission, for all threads of this process. False if the kernel does not know tiles or does not allow them."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)
