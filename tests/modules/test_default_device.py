"""torch's default device is the user's business: with the model and the data on the CPU it changes no number.

``meta`` stands for any other: what is made there by mistake has no numbers, and no CPU generator draws there.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import with_spectrum
from problems import loader, module, network
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torch_influence import (
    AutogradInfluenceModule,
    CGInfluenceModule,
    InfluenceModule,
    LiSSAInfluenceModule,
    solvers,
)
from torch_influence.linop import probe_rows
from torch_influence.ops import _cg_step

SOURCE = Path(__file__).parents[2] / "src" / "torch_influence"
MAKERS = {"as_tensor", "asarray", "tensor", "empty", "empty_strided", "zeros", "ones", "full", "eye", "arange"}
MAKERS |= {"linspace", "logspace", "rand", "randn", "randint", "randperm", "tril_indices", "triu_indices"}


def drawn_by() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(3)


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 3).double()


def convolution() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(3, 3)).double()


MODULES: dict[str, tuple[Any, Callable[[], nn.Module], dict[str, Any]]] = {
    "auto": (InfluenceModule, network, {}),
    "linear": (InfluenceModule, linear, {}),
    "convolution": (InfluenceModule, convolution, {"gnh": True}),
    "nystrom": (InfluenceModule, network, {"solver": "cg", "M": solvers.Nystrom(3)}),
    "not kept": (CGInfluenceModule, network, {"M": solvers.Jacobi(), "cache": False}),
    "block": (InfluenceModule, network, {"solver": "block"}),
    "minres": (InfluenceModule, network, {"solver": "minres"}),
    "direct": (InfluenceModule, network, {"solver": "direct", "gnh": True}),
    "autograd": (AutogradInfluenceModule, network, {}),
    "lissa": (LiSSAInfluenceModule, network, {"scale": "auto"}),
    "lissa, linear": (LiSSAInfluenceModule, linear, {"generator": drawn_by}),
    "lissa, not kept": (LiSSAInfluenceModule, network, {"cache": False, "generator": drawn_by}),
}


def made(name: str) -> Any:
    kind, model, options = MODULES[name]
    options = {key: value() if value is drawn_by else value for key, value in options.items()}
    train = DataLoader(loader().dataset, batch_size=5, shuffle=True)
    return module(kind, model=model(), train_loader=train, damp=5.0, on_failure="ignore", **options)


@pytest.mark.parametrize("name", MODULES)
def test_a_default_device_changes_no_number_of_a_module(name: str) -> None:
    found = []
    for default in ("cpu", "meta"):
        subject = made(name)
        torch.manual_seed(5)
        with torch.device(default):
            found.append([subject.influence_matrix(), subject.self_influences([0, 1]), torch.get_rng_state()])
    assert all(map(torch.equal, *found))


def test_a_default_device_changes_nothing_that_a_module_says() -> None:
    found = []
    for default in ("cpu", "meta"):
        subject = made("auto")
        torch.manual_seed(5)
        with torch.device(default):
            sampled = [subject.batches(sample=3), subject.batches(sample=3, idxs=[1, 2, 5], generator=drawn_by())]
            found.append(
                [
                    str(subject.explain(2)),
                    str(subject.influence_matrix(top_k=2)),
                    [(check.name, check.value) for check in subject.verify(print=False).checks],
                    subject.spectrum(2).largest.tolist(),
                    [batch[0].tolist() for batches in sampled for batch, _ in batches],
                ]
            )
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["cg", "block_cg", "minres", "direct", "lissa"])
@pytest.mark.parametrize("given", [lambda t: t, lambda t: t.numpy()], ids=["tensors", "arrays"])
def test_a_default_device_changes_no_solve(name: str, given: Callable[[Tensor], Any]) -> None:
    matrix, rows = with_spectrum(torch.linspace(1.0, 3.0, 12)), torch.randn(3, 12, dtype=torch.float64)
    options: dict[str, Any] = {} if name in ("direct", "lissa") else {"x0": np.ones(12)}
    found = []
    for default in ("cpu", "meta"):
        A: Any = given(matrix)
        if name == "lissa":
            A, options = [given(matrix), given(2 * matrix)], {"generator": drawn_by(), "repeat": 2, "depth": 10}
        with torch.device(default):
            x, report = getattr(solvers, name)(A, given(rows), on_failure="ignore", **options)
            found.append([x, report.residual, torch.tensor(report.eigenvalues, device="cpu").nan_to_num(0.0)])
    assert all(map(torch.equal, *found))


def test_the_global_setting_is_no_other() -> None:
    torch.set_default_device("meta")
    try:
        example = _cg_step.example(drawn_by())
        rows = probe_rows(2, 3, dtype=torch.float32, device="cpu")
    finally:
        torch.set_default_device(None)
    assert {t.device for t in (rows, example["x"], example["scalars"])} == {torch.device("cpu")}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_tensor_is_made_on_a_device_that_is_named(path: Path) -> None:
    unnamed = [
        ast.unparse(call)
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and call.func.attr in MAKERS
        and "device" not in {keyword.arg for keyword in call.keywords}
    ]
    assert unnamed == []
