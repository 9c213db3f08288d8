"""What several test files use: small models, comparisons, ways to compile."""
