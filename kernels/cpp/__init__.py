"""The operator in C++, generated for a family: for CPUs."""
