"""Purification: noise levels, guidance, processes, gradient engines, and the purifier made of them."""
