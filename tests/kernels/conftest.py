from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread():
    """Hundreds of tiny products; on a busy machine each would wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
