from __future__ import annotations

import gc
import os

import pytest
import torch

from torch_influence import backend_info

# Many tiny problems, several processes of them: a thread pool in each would cost more than it gives. The second is for
# programs that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # that would write down the stack for each kind of device that isn't there
        torch.default_generator.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = backend_info().cuda
    if reason:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=f"no native CUDA ops: {reason}"))


def pytest_collection_finish() -> None:
    """Garbage is looked for among what tests make, not again and again among a million objects of torch's modules."""
    gc.collect()
    gc.freeze()
