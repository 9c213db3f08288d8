"""Level weights: the module, its kinds, attaching it to a model, and what others make of it meanwhile."""
