"""What `llcompile.inspect` shows: a model's mixers before and after, what they cost, the kernels, a page."""
