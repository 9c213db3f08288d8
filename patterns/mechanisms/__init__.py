"""The other ways to mix a sequence: each file names one kind, from the program alone; identify.py has their table."""
