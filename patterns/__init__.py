"""What a mixer is: the Mixer node, the table of families, and the tables of known library functions."""
