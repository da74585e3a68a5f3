"""Kernels in C++ for CPUs with AVX2 or AVX-512. `library` builds and loads them and is the only door; the other files name them.

Nothing here is needed: where it is not built, or does not prove right when it is loaded, its callers take torch's operations.
"""
