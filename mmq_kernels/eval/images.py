"""Images as pixel values, preprocessed once however often they are evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmq_kernels.eval.errors import DataError


def open_image(path: Path) -> Image.Image:
    """The whole image at `path`, as RGB.

    Raises:
        DataError: no such file, no image, or a truncated one.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"no image {path}") from None
    except UnidentifiedImageError:
        raise DataError(f"{path} is no image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is a damaged image: {error}") from None


class PixelStore:
    """Pixel values of image files, kept in memory up to a bound so that repeated evaluations share them.

    Args:
        processor: a processor or image processor: ``processor(images=[...], return_tensors="pt")``.
        max_bytes: what may be kept; images past it are preprocessed again each time.
    """

    def __init__(self, processor: Any, *, max_bytes: int = 1 << 30) -> None:
        self._process = getattr(processor, "image_processor", processor)
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: dict[Path, Tensor] = {}

    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """Pixel values ``[len(paths), channels, height, width]`` on the CPU.

        Raises:
            DataError: a file is no whole image.
        """
        fresh = [path for path in dict.fromkeys(paths) if path not in self._kept]
        pixels: dict[Path, Tensor] = {}
        if fresh:
            batch = self._process(images=[open_image(path) for path in fresh], return_tensors="pt")
            pixels = dict(zip(fresh, batch["pixel_values"].unbind(), strict=True))
        for path, values in pixels.items():
            size = values.numel() * values.element_size()
            if self._bytes + size <= self._max_bytes:
                self._kept[path] = values.clone()
                self._bytes += size
        return torch.stack([pixels[path] if path in pixels else self._kept[path] for path in paths])
