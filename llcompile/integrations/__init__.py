"""Where other libraries are told of level weights: one file for each. They are loaded when the library is."""

# What a configuration or a file's header keeps of level weights, see `checkpoint.section`.
SECTION = "loglinear"
