"""What is read of a graph before anything is recognised in it: its regions, and what its operations do to memory."""
