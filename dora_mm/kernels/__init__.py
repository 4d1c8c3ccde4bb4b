"""The Triton kernels of the layer, one per file. Importing them needs triton."""
