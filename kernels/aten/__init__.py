"""The lowering to ATen operations: chunks of tokens, then a tree or a scan over the chunks."""
