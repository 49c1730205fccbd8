"""Networks that no library carries, and the strict and safe loading of weights into any network."""
