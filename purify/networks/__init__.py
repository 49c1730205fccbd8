"""Networks that no library carries, and those of the embedded models."""
