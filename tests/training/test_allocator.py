"""What a step on the CPU frees is not given back to the system."""

import ctypes
import resource

import pytest

from stepdistill.training.allocator import keep_freed_memory

PIECES, SIZE, PAGE = 32, 2**23, resource.getpagesize()


def pages_mapped():
    """Take pieces of 8 MB, fill and free them, as a step does; return how many pages the system had to map."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [library.malloc(SIZE) for _ in range(PIECES)]
    for piece in pieces:
        ctypes.memset(piece, 1, SIZE)
    for piece in pieces:
        library.free(piece)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_memory_that_is_freed_is_taken_again_without_new_pages():
    if not keep_freed_memory():
        pytest.skip("needs glibc")
    pages_mapped()
    assert sum(pages_mapped() for _ in range(3)) < SIZE / PAGE
