"""Memory that begins where a large page does."""

import copy
import gc
import io
import mmap
import weakref

import pytest
import torch

from mmq_kernels.backends import pages
from mmq_kernels.nn import QuantLinear
from mmq_kernels.spec import QuantSpec

linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages to ask this system for")


@linux
@pytest.mark.parametrize("count", [2**19, 2**19 + 1, 3 * 2**18, 2**21 - 5])
def test_what_fills_a_large_page_begins_with_one(count) -> None:
    tensor = pages.empty((count,), torch.int32)
    assert tensor.shape == (count,) and tensor.dtype == torch.int32
    assert tensor.data_ptr() % pages.LARGE_PAGE == 0
    assert tensor.untyped_storage().nbytes() == 4 * count, "what is beside it would be saved with it"
    tensor.fill_(7)
    assert tensor.sum().item() == 7 * count


def test_what_is_smaller_is_torch_memory() -> None:
    assert pages.empty((0, 3), torch.int32).shape == (0, 3)
    assert pages.empty((2**19 - 1,), torch.int32).untyped_storage().resizable(), "memory of others cannot grow"


@linux
def test_a_system_without_large_pages_changes_nothing(monkeypatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert pages.empty((2**20,), torch.int32).fill_(3).sum().item() == 3 * 2**20


@linux
def test_memory_goes_with_the_last_tensor_that_has_it(monkeypatch) -> None:
    blocks = []

    class Watched(mmap.mmap):
        def __init__(self, *_, **__):
            blocks.append(weakref.ref(self))

    monkeypatch.setattr(mmap, "mmap", Watched)
    tensor = pages.empty((2**20,), torch.int32)
    part = tensor[5:]
    del tensor
    gc.collect()
    assert blocks[0]() is not None and part.fill_(1).sum().item() == 2**20 - 5
    del part
    gc.collect()
    assert blocks[0]() is None


@linux
def test_a_layer_can_be_copied_and_saved() -> None:
    n = k = 2048
    spec = QuantSpec(4)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, spec.groups(k)).half()
    layer = QuantLinear.from_codes(codes, scale, torch.full((n, spec.groups(k)), 7, dtype=torch.uint8), spec)
    layer.prepack()
    weight = layer.weight_runtime
    assert weight.data_ptr() % pages.LARGE_PAGE == 0
    saved = io.BytesIO()
    torch.save(weight, saved)
    assert saved.tell() < weight.nbytes + 2**14
    saved.seek(0)
    assert torch.equal(torch.load(saved), weight)
    x = torch.randn(3, k)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
