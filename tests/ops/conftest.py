from __future__ import annotations

import pytest

from torch_influence import backend_info


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = backend_info().cuda
    if reason:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=f"no native CUDA ops: {reason}"))
