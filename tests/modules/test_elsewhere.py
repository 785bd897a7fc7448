"""Modules on a device that this machine doesn't have: the same scores, and nothing mixed on the way to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elsewhere import Elsewhere, elsewhere, moved
from oracles import Supervised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import InfluenceModule
from torch_influence.solvers import CG, BlockCG, Direct, DualDirect, LiSSA, Minres, Nystrom

pytestmark = pytest.mark.filterwarnings("ignore")

N = 17


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.embedding(x)).tanh().mean(1))


MODELS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(4, 3), lambda n: torch.randn(n, 4).double()),
    "convolutional": (Convolutional, lambda n: torch.randn(n, 1, 4, 4).double()),
    "tokens": (Tokens, lambda n: torch.randint(5, (n, 3))),
}
SOLVERS = {
    "auto": None,
    "direct": Direct(),
    "cg": CG(),
    "cg with Nystrom": CG(M=Nystrom(3)),
    "block_cg": BlockCG(),
    "minres": Minres(),
    "dual": DualDirect(),
    "lissa": LiSSA(depth=20),
}


def scores(kind: str, solver: Any, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    build, inputs = MODELS[kind]
    model = build().double()
    data = [TensorDataset(inputs(n), torch.randint(3, (n,))) for n in (N, 4)]
    module = InfluenceModule(
        model if device == "cpu" else moved(model),
        Supervised(F.cross_entropy),
        *(DataLoader(d, batch_size=5) for d in data),
        torch.device(device),  # type: ignore[arg-type]
        damp=3.0,
        curvature="gauss-newton",
        **({} if solver is None else {"solver": solver}),
    )
    found = [module.influences(range(N), [0, 1]), module.influence_matrix(), module.self_influences()]
    found += [module.influence_matrix(top_k=3).helpful.values]
    assert all(t.device.type == "cpu" for t in found)
    return found


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", MODELS)
def test_no_module_mixes_devices(kind: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scores(kind, SOLVERS[solver], "cpu")
    with elsewhere(monkeypatch):
        found = scores(kind, SOLVERS[solver], Elsewhere.device.type)
    for actual, one in zip(found, expected, strict=True):
        assert torch.allclose(actual, one, rtol=1e-6, atol=1e-9)
