"""Which parts of a recipe, and of its use, can be stacked on each other."""
