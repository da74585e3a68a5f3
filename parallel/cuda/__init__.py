"""Triton kernels for CUDA devices. Only this package imports triton, and it is not imported on CPU-only machines.

Each kernel has a reference in plain torch that the tests compare it with. Without a GPU they run under Triton's interpreter
(``TRITON_INTERPRET=1``), and the kernels are also compiled for sm_90.
"""
