"""What other libraries are told of llcompile, and what is known of their releases."""
