"""What `convert` measures on the model's example inputs, all of which is put back afterwards."""
