"""Triton runs under its interpreter where there is no GPU, and memory that torch.empty hands out is NaN."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

# Read when a kernel is defined, so before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_empty():
    """torch.empty yields NaN (the largest integer, True), so an output that is not written fails."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
