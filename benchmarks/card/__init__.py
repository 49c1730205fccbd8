"""What gpu.py measures on one card: a file for each kind of measurement, all on the networks of `bench`."""
