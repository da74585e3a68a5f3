"""Integer arithmetic for launches on the host. Triton's own functions take 2 us per call, as they also serve kernels."""


def cdiv(number: int, size: int) -> int:
    """``number / size``, rounded up."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is at least ``number`` (> 0)."""
    return 1 << (number - 1).bit_length()
