"""Diffusion models: schedules, keyed noise, score networks and reverse steps."""
