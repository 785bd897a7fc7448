from __future__ import annotations

import pytest
import torch

# Many tiny problems, several processes of them: a thread pool in each would cost more than it gives.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
