"""Compares what two checkouts of llcompile say of the same models: `python -m benchmarks.checkouts`."""
