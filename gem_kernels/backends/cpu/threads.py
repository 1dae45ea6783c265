"""Compiled functions on several threads that share a counter of the work."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_pool: ThreadPoolExecutor | None = None
_pool_pid = 0


def _executor() -> ThreadPoolExecutor:
    """Made on first use, and again in a forked child, where the parent's threads do not exist."""
    global _pool, _pool_pid
    # No lock: a child forked while another thread holds it would wait for ever. Two threads may make one pool each.
    pool = _pool
    if pool is None or _pool_pid != os.getpid():
        workers = max(os.cpu_count() or 1, torch.get_num_threads())
        pool = _pool = ThreadPoolExecutor(workers, thread_name_prefix="gem_kernels")
        _pool_pid = os.getpid()
    return pool


def run_on_threads(function: Callable[[int], Any], arguments: ctypes.Structure, most: int) -> None:
    """Calls `function` on torch.get_num_threads() threads, at most `most`, this one included.

    They share the counter that the field `next` of `arguments` points to.
    """
    counter = ctypes.c_int64(0)
    arguments.next = ctypes.addressof(counter)
    address = ctypes.addressof(arguments)
    others = [_executor().submit(function, address) for _ in range(min(torch.get_num_threads(), most) - 1)]
    try:
        function(address)
    finally:
        for other in others:
            other.result()
