"""Curvatures on a device that this machine doesn't have: the same products, and nothing mixed; what sampling copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from elsewhere import Elsewhere, elsewhere, moved, numbers
from heads import HEADS, NO_HEADS, Case
from torch import Tensor

from torch_influence import CGInfluenceModule
from torch_influence.curvature import Curvature, LinearHead, _linear_head
from torch_influence.linop import LinearOperator

pytestmark = pytest.mark.filterwarnings("ignore")

# Of each kind of curvature at the outputs, and the ways without one; others have losses with tensors on the CPU.
CASES = {
    name: {**HEADS, **NO_HEADS}[name]
    for name in ("softmax", "squared error", "ignore_index", "no bias", "frozen trunk", "two layers", "sequences")
}
kinds = pytest.mark.parametrize("gnh", [False, True], ids=["hessian", "gauss-newton"])


def module(case: Case, gnh: bool) -> CGInfluenceModule:
    model = moved(case.model())
    loader = case.loader
    return CGInfluenceModule(model, case.objective, loader(), loader(), Elsewhere.device, 0.0, gnh, params=case.params)


def parts(operator: Curvature, rows: Tensor) -> Iterator[Tensor]:
    """What solvers ask of it."""
    yield operator.product(rows)
    yield operator.dense()
    diagonal = operator.diagonal()
    if diagonal is not None:
        yield diagonal
    torch.manual_seed(1)
    for minibatch in operator.sampled(3, None):
        yield minibatch.product(rows)


@kinds
@pytest.mark.parametrize("name", CASES)
def test_no_curvature_mixes_devices(name: str, gnh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    here = case.module(gnh=gnh)
    with here._problem.session():
        operator = here._problem.curvature()
        rows = torch.randn(3, operator.size, dtype=torch.float64)
        expected = list(parts(operator, rows))
    with elsewhere(monkeypatch) as mode:
        there = module(case, gnh)
        with there._problem.session():
            found = list(parts(there._problem.curvature(), rows.to(mode.device)))
    assert len(found) == len(expected)
    for actual, one in zip(found, expected, strict=True):
        assert actual.device == mode.device
        assert torch.allclose(numbers(actual), one, rtol=1e-12, atol=1e-12)


def test_sampling_a_head_copies_indices_once_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 40
    with elsewhere(monkeypatch) as mode:
        there = module(HEADS["softmax"], False)
        with there._problem.session():
            head = there._problem.curvature()
            assert type(head) is LinearHead
            rows = torch.ones(1, head.size, dtype=torch.float64).to(mode.device)
            for generator, copies in ((None, 1), (torch.Generator(), steps)):
                waits, before = mode.waits.total(), mode.copies
                for minibatch in head.sampled(steps, generator):
                    minibatch.product(rows)
                assert mode.waits.total() == waits
                assert mode.copies == before + copies


@pytest.mark.parametrize("at_once", [1, 12, 2**16])  # indices: a minibatch, two, all
@pytest.mark.parametrize("seeded", [False, True])
def test_drawing_ahead_changes_no_draw(seeded: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what others draw meanwhile from the same generator, nor what is left of it where all ends early."""
    monkeypatch.setattr(_linear_head, "_INDICES_AT_ONCE", at_once)
    case = HEADS["softmax"]
    operator = case.module()._problem.curvature()
    rows = torch.ones(1, operator.size, dtype=torch.float64)

    def drawn(source: LinearOperator) -> list[Tensor]:
        torch.manual_seed(7)
        generator = torch.Generator().manual_seed(7) if seeded else None
        found = []
        for step, minibatch in enumerate(source.sampled(30, generator)):
            found += [minibatch.product(rows), torch.rand(1, generator=generator)]
            if step == 20:
                break
        return [*found, torch.rand(1, generator=generator)]

    assert type(operator) is LinearHead
    ahead, plain = drawn(operator), drawn(operator.plain)
    for one, other in zip(ahead, plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    for one, other in zip(ahead[1::2], plain[1::2], strict=True):
        assert torch.equal(one, other)
