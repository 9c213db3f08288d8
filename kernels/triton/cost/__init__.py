"""What the Triton kernels move, compute and allocate, counted without a GPU (`llcompile kernels cost`)."""
