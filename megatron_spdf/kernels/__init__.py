"""Expand and compress: between a compact vector and the dense weight it stands for.

One interface over implementations; today the PyTorch one, on CPU and CUDA.
"""

from megatron_spdf.kernels.torch_reference import compress, expand, make_index

NAME = "torch"  # of the implementation, for the log

__all__ = ["NAME", "compress", "expand", "make_index"]
