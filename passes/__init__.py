"""What is done to a graph: one pass a file, listed in order in pipeline.py."""
