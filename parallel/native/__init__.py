"""C++ kernels for CPUs with AVX2 or AVX-512. `library` builds and loads them; the other modules call them through it.

The kernels are optional: where they are not built or cannot be loaded, callers fall back to torch's operations.
"""
