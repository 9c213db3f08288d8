"""Everything that touches torch's private interfaces: one idea a file; tests/torch_internals checks each."""
