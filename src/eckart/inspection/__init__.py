"""A look at everything that a model or a file of weights holds."""
