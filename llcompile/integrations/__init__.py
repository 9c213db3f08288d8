"""Where other libraries are told of level weights: one file for each. They are loaded when the library is."""
