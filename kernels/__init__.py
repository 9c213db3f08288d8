"""What runs: level arithmetic, the float64 definition, and the torch operators on ATen. Knows nothing of graphs."""
