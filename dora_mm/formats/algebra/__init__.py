"""What the adapter of one module computes: exact changes of form, fits of low rank, fused projections."""
