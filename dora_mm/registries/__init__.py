"""Registries of choices by name: families, tasks, readers, scorers, optimizers, tools; other packages add to them."""
