"""What there is to choose from, by name: families, tasks, readers, scorers, optimizers, tools; other packages add to it."""
