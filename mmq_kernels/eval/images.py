"""Images as pixel values, preprocessed once however often they are evaluated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mmq_kernels.eval.errors import DataError


class HasImage(Protocol):
    """A sample: an image, and what its publisher calls the sample."""

    @property
    def id(self) -> int | str: ...

    @property
    def image(self) -> Path: ...


def require_images(samples: Sequence[HasImage]) -> None:
    """Opens the image of every sample, so that nothing is found missing or damaged after hours.

    Raises:
        DataError: naming the first, its sample, and how many there are.
    """
    paths = list(dict.fromkeys(sample.image for sample in samples))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"no image {missing[0]}{uses(samples, missing, len(paths))}")
    damaged = {path: why for path, why in zip(paths, image_faults(paths), strict=True) if why}
    if damaged:
        first = next(iter(damaged))
        raise DataError(f"{damaged[first]}{uses(samples, list(damaged), len(paths))}")


def uses(samples: Sequence[HasImage], bad: Sequence[Path], seen: int) -> str:
    """Which sample the first of the `bad` images belongs to, and how many are bad of how many `seen`."""
    sample = next(sample for sample in samples if sample.image == bad[0])
    return f" (sample {sample.id}; {len(bad)} of {seen} images are so)"


def image_faults(paths: Sequence[Path]) -> list[str | None]:
    """What is wrong with each image, or None; all their bytes are decoded, JPEG at an eighth of the size."""

    def fault(path: Path) -> str | None:
        try:
            open_image(path, side=1)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(fault, paths))


def open_image(path: Path, side: int | None = None) -> Image.Image:
    """The whole image at `path`, as RGB.

    Args:
        side: of a JPEG, decode no larger than it takes to have so many pixels each way; None decodes all.

    Raises:
        DataError: no such file, no image, or a truncated one.
    """
    try:
        with Image.open(path) as image:
            if side is not None:
                image.draft("RGB", (side, side))
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
