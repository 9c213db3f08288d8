"""The other ways to mix a sequence: each file names one kind, from the graph alone; identify.py runs their table."""
