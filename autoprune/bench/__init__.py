"""The speed benchmark: what pruning really saves in time and memory, beside what its FLOPs promise."""
