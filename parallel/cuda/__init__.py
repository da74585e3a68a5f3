"""Kernels for CUDA devices, written in Triton. triton comes in by this folder alone, and nothing imports it on a CPU.

Each kernel has a slow twin in plain torch that the tests compare it with: under Triton's interpreter where there is no GPU
(``TRITON_INTERPRET=1``), and compiled for sm_90 there too.
"""
