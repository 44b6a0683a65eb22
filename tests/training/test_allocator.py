"""What a step on the CPU frees is not given back to the system."""

import resource

import pytest
import torch

from stepdistill.training.allocator import keep_freed_memory


def test_memory_that_is_freed_is_taken_again_without_new_pages():
    if not keep_freed_memory():
        pytest.skip("needs glibc")
    for _ in range(3):
        torch.zeros(2**22)  # 16 MB, 4096 pages
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**22)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 5 * 4096  # and not all 10
