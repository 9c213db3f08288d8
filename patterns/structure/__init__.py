"""Structure: finds the mixers that were written by hand, by what they compute and not by how it is spelled."""
