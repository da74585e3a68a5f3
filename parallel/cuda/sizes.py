"""Arithmetic of launches, on the host: Triton's own takes 2 us a call, as it is for kernels too."""


def cdiv(number: int, size: int) -> int:
    """How many pieces of ``size`` cover ``number``."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """The least that is not below ``number``, which is above 0."""
    return 1 << (number - 1).bit_length()
