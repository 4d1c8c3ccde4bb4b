"""What may be chosen by name: families, tasks, readers, scorers, optimizers, tools; other packages add to it."""
