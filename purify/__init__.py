"""purify: diffusion-based adversarial purification, attacked with exact gradients and reported honestly."""

__version__ = "0.1.0"
