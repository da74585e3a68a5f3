"""The small operations between matrices on a CUDA device; see `parallel.elementwise_kernels.ElementwiseKernels`."""

from torch import Tensor

from parallel.cuda.elementwise import add_rms_norm, rms_norm, rotate, swiglu


class CudaElementwise:
    """Kernels in Triton, for any floating dtype."""

    def add_norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
        if delta_TD is None:
            return rms_norm(x_TD.contiguous(), weight_D, eps)
        return add_rms_norm(delta_TD.contiguous(), x_TD, weight_D, eps)

    def gate(self, gate_up_TX: Tensor) -> Tensor:
        return swiglu(gate_up_TX.contiguous())

    def rotate(self, x_TXK: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
        return rotate(x_TXK, cos_T1F.contiguous(), sin_T1F.contiguous())
