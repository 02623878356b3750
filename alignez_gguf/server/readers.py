"""Threads with a deep stack, in which prompts are tokenized.

Many vocabularies are split with std::regex (unicode_regex_split_stl in llama.cpp's src/unicode.cpp), which
calls itself for every character of an unbroken run: on a usual stack, 20,000 digits end the process.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

_COUNT = 2
_BYTES_PER_CHARACTER = 1024
"""Of stack; 330 were measured. What is not used takes no memory."""
_PAGE = 64 << 10
_SPARE = 1 << 20


def readers(n_characters: int) -> ThreadPoolExecutor:
    """Threads that can tokenize so many characters."""
    n_bytes = _SPARE + n_characters * _BYTES_PER_CHARACTER
    barrier = threading.Barrier(_COUNT + 1)
    pool = ThreadPoolExecutor(_COUNT, thread_name_prefix="alignez-reader")
    usual = threading.stack_size(-(-n_bytes // _PAGE) * _PAGE)
    try:
        for _ in range(_COUNT):
            pool.submit(barrier.wait)  # a pool makes its threads when they are needed
    finally:
        threading.stack_size(usual)
    barrier.wait()
    return pool
