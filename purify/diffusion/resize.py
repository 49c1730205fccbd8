"""Between the size of a data set's images and that of a score model's, as DiffPure does on ImageNet (224 to 256)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import interpolate


def resized(images: Tensor, shape: Sequence[int]) -> Tensor:
    """Images (N, C, H, W), bilinearly (without antialiasing) at the height and width of ``shape`` (C, H, W)."""
    size = tuple(shape[1:])
    return images if images.shape[2:] == size else interpolate(images, size, mode="bilinear", align_corners=False)


def needs_resize(images: Sequence[int], model: Sequence[int] | None) -> bool:
    """Whether images of shape ``images`` (C, H, W) have another size than a score model's (None: it takes any).

    Raises:
        ValueError: other channels, or a score model for smaller images, which would throw detail away.
    """
    if model is None or tuple(images) == tuple(model):
        return False
    facts = f"These images have shape {tuple(images)} (C, H, W), but the score network takes {tuple(model)}"
    if images[0] != model[0]:
        raise ValueError(f"{facts}; use one of this data set.")
    if any(m < i for i, m in zip(images, model, strict=True)):
        raise ValueError(
            f"{facts}: shrinking them would throw detail away. Use a score network of this data set; if you mean it, "
            "pass a purifier of your own, made with resize=True."
        )
    return True
