"""Triton kernels of the layer, one file each. Whoever imports this package needs triton."""
