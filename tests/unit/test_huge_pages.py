"""Memory of packed weights and caches."""

from __future__ import annotations

import mmap
import resource
import sys

import pytest
import torch

from outpace.kernels import huge_pages, new_cache
from outpace.kernels.huge_pages import HugePages, populate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_is_equal_and_contiguous(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 7, dtype=torch.float32).to(dtype).T
    copy = HugePages().copy(tensor)
    assert copy.is_contiguous()
    assert torch.equal(copy, tensor)


def test_copies_share_a_chunk_and_do_not_overlap() -> None:
    pages, tensors = HugePages(), [torch.full((size,), float(size)) for size in (3, 100, 1)]
    copies = [pages.copy(tensor) for tensor in tensors]
    assert all(map(torch.equal, copies, tensors))
    assert [copy.data_ptr() - copies[0].data_ptr() for copy in copies] == [0, 64, 512]


def test_a_full_chunk_is_followed_by_another_and_a_large_tensor_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huge_pages, "_CHUNK", 4096)
    pages, tensors = HugePages(), [torch.randn(size) for size in (600, 600, 5000, 10)]
    copies = [pages.copy(tensor) for tensor in tensors]
    assert all(map(torch.equal, copies, tensors))


def test_a_copy_outlives_its_maker() -> None:
    copy = HugePages().copy(torch.arange(1000))
    assert torch.equal(copy, torch.arange(1000))


def test_a_cache_is_zeros_of_its_shape() -> None:
    keys, values = new_cache((2, 5, 3), 32, torch.bfloat16, group=2)
    assert keys.shape == (2, 5, 3, 16, 16, 2)
    assert values.shape == (2, 5, 3, 8, 32, 2)
    assert not keys.any()
    assert not values.any()
    keys.fill_(1)
    assert not values.any(), "they do not overlap"


def test_a_system_without_huge_pages_gets_a_plain_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    tensor = torch.randn(4, 4).T
    copy = HugePages().copy(tensor)
    assert copy.is_contiguous()
    assert torch.equal(copy, tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems find memory when it is written")
def test_populated_memory_is_there_before_it_is_written() -> None:
    def num_faults(tensor: torch.Tensor) -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        tensor.fill_(1)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    size = 64 << 20
    untouched, populated = (HugePages().zeros((size,), torch.uint8) for _ in range(2))
    thread = populate(populated)
    assert thread is not None
    thread.join()
    assert not populated.any()
    assert num_faults(populated) < num_faults(untouched) / 4


@pytest.mark.skipif(sys.platform != "linux", reason="other systems find memory when it is written")
def test_memory_that_is_not_free_is_not_populated(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = HugePages().zeros((2 * mmap.PAGESIZE,), torch.uint8)
    monkeypatch.setattr("os.sysconf", lambda _: 3)  # pages, half of which are fewer than two
    assert populate(tensor) is None
    monkeypatch.setattr("os.sysconf", lambda _: 4)
    assert populate(tensor) is not None
