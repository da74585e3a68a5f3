"""Permission to use AMX tiles, which Linux gives to a process that asks for it (Documentation/arch/x86/xstate.rst)."""

import ctypes
import logging
import os
import platform
import sys
from functools import cache

logger = logging.getLogger(__name__)

_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@cache
def may_use_tiles() -> bool:
    """Ask for the permission, for all threads of this process; to be called if the processor has tiles. False if Linux refuses."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0:
        return True
    logger.warning("this processor has AMX tiles, but Linux refuses them to this process: %s", os.strerror(ctypes.get_errno()))
    return False
