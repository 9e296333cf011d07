"""Images that are none, or only half, are named; pixel values are computed once."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_blip2 import processor, write_image

from mmq_kernels.eval import DataError, PixelStore
from mmq_kernels.eval.images import open_image


def test_bad_images_are_named(tmp_path: Path) -> None:
    whole = write_image(tmp_path / "whole.png", seed=1)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    assert open_image(whole).mode == "RGB"
    with pytest.raises(DataError, match=r"half\.png is a damaged image"):
        open_image(tmp_path / "half.png")
    with pytest.raises(DataError, match=r"text\.jpg is no image"):
        open_image(tmp_path / "text.jpg")
    with pytest.raises(DataError, match=r"empty\.jpg is no image"):
        open_image(tmp_path / "empty.jpg")
    with pytest.raises(DataError, match=r"no image .*gone\.jpg"):
        open_image(tmp_path / "gone.jpg")


def test_truncated_jpeg_is_named(tmp_path: Path) -> None:
    whole = write_image(tmp_path / "whole.jpg", seed=1)
    (tmp_path / "half.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(DataError, match=r"half\.jpg is (a damaged|no) image"):
        open_image(tmp_path / "half.jpg")


def test_grey_and_palette_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "1"):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (20, 20)).save(path)
        assert open_image(path).mode == "RGB"


def test_pixels_equal_the_processor_and_are_computed_once(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    owner = processor()
    store = PixelStore(owner)
    expected = owner(images=[Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    assert torch.equal(store(paths), expected)
    for path in paths:
        path.unlink()
    assert torch.equal(store([paths[2], paths[0], paths[2]]), expected[[2, 0, 2]])


def test_store_is_bounded(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{i}.png", seed=i) for i in range(2)]
    one_image = 3 * 16 * 16 * 4
    store = PixelStore(processor(), max_bytes=one_image)
    first = store(paths)
    assert torch.equal(store(paths), first)
    paths[1].unlink()
    with pytest.raises(DataError, match=r"no image .*1\.png"):
        store(paths)
    assert torch.equal(store(paths[:1]), first[:1])
