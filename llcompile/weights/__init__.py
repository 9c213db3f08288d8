"""Level weights: the module, its kinds, attaching it to a model, and what others make of it meanwhile."""

# Where a configuration or the header of a file keeps what level weights a model has, see `checkpoint.section`.
SECTION = "loglinear"
