"""Triton kernels, generated from a description of the operator. Triton itself is imported only when one is run."""
