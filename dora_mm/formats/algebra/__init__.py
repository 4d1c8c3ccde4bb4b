"""The algebra of one module's adapter: exact changes of form, fits of low rank, fused projections."""
