"""Linear heads of data that are too large to be kept: captured in one pass, right, never stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import Supervised, assert_close, dense_gauss_newton, dense_hessian, loader_batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from torch_influence import AutogradInfluenceModule, CGInfluenceModule, LiSSAInfluenceModule
from torch_influence.curvature import Curvature, LinearHead
from torch_influence.losses import in_one_batch

# Losses that couple the examples of a batch are among the cases; test_errors.py has what is said of them.
pytestmark = pytest.mark.filterwarnings("error", "ignore:.* over the batch, got something else")

N, BATCH, WIDTH, FEATURES, CLASSES = 17, 5, 100, 4, 3  # the last batch has 2
BUDGET = N * 8 * (FEATURES + CLASSES**2)  # of the data's N * 8 * (WIDTH + 1)
PROBED = 3  # examples that every call looks at
UNSEEN = 5  # an example that is none of them
SWEEPS = 4  # forward, backward, and the two of the second derivative


class Images(Dataset):
    """Large inputs; ``twist`` may change what is read."""

    def __init__(self, twist: Callable[[Images, int, Tensor], Tensor] | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(N, WIDTH, generator=generator, dtype=torch.float64)
        self.y = torch.randint(CLASSES, (N,), generator=generator)
        self.twist = twist or (lambda data, index, x: x)
        self.old = False
        self.log: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.log.append(index)
        return self.twist(self, index, self.x[index]), self.y[index]


def backbone() -> nn.Module:
    torch.manual_seed(1)
    trunk = nn.Sequential(nn.Linear(WIDTH, 2 * FEATURES), nn.Tanh()).requires_grad_(False)
    return nn.Sequential(trunk, nn.Flatten(), Half(), nn.Linear(FEATURES, CLASSES)).double()


class Half(nn.Module):
    """A view, which holds on to all that it is a view of."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :FEATURES]


def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
    """Its Hessian joins the outputs of an example."""
    return (outputs - F.one_hot(targets, CLASSES)).square().sum(1).square().mean()


def centred(items: Any) -> Any:
    x, y = default_collate(items)
    return x - x.mean(dim=0), y


def module(data: Dataset, loss: Any = F.cross_entropy, gnh: bool = False, collate: Any = None, **options: Any) -> Any:
    of = DataLoader(data, batch_size=BATCH, collate_fn=collate)
    options = {"cache": BUDGET, "rtol": 1e-12} | options
    return CGInfluenceModule(backbone(), Supervised(loss, 0.05), of, of, "cpu", 1.0, gnh, **options)


def reference(it: Any, gnh: bool = False) -> Tensor:
    dense = dense_gauss_newton if gnh else dense_hessian
    return dense(it.model, it.objective, loader_batches(it.train_loader))


def assert_products(actual: Tensor, rows: Tensor, matrix: Tensor) -> None:
    size = float((rows.abs() @ matrix.abs()).max())
    assert_close(actual, rows @ matrix, operations=SWEEPS * N * WIDTH, scale=size)


@pytest.mark.parametrize("loss", [F.cross_entropy, quartic])
@pytest.mark.parametrize("gnh", [False, True], ids=["hessian", "gauss-newton"])
@pytest.mark.parametrize("collate", [None, centred], ids=["stacks", "does not stack"])
def test_a_head_is_captured_in_one_pass(loss: Any, gnh: bool, collate: Any) -> None:
    it = module(Images(), loss, gnh, collate)
    matrix = reference(it, gnh)
    rows = torch.randn(3, len(matrix), dtype=torch.float64)
    watched = {i * (N - 1) // 3 for i in range(4)}  # their losses tell whether anything has changed
    looked_at = {N // 2, *in_one_batch(it._problem.train)[0], *watched}
    log = it.train_loader.dataset.log
    log.clear()
    assert_products(it.hvp(rows), rows, matrix)
    head = it._problem._curvature[1]
    assert type(head) is LinearHead, it._problem.curvature().why_no_head
    assert it._problem.train.kept_bytes == 0
    assert head.x.untyped_storage().nbytes() == N * FEATURES * 8
    assert head.kept_bytes <= BUDGET
    # The first batch, the last and the probed examples are looked at more than once.
    assert all(log.count(i) == 1 for i in range(BATCH, N - N % BATCH) if i not in looked_at)
    log.clear()
    assert_products(it.hvp(rows), rows, matrix)
    assert it._problem._curvature[1] is head
    assert len(log) == PROBED
    assert "closed form" in it.explain()["curvature"].path
    assert "the budget is" in str(it.explain())


def test_the_same_scores_and_draws_as_without() -> None:
    results = []
    for cache in (BUDGET, False):
        it = module(Images(), cache=cache)
        torch.manual_seed(4)
        results.append((it.influence_matrix(), it.self_influences(), torch.get_rng_state()))
    assert torch.equal(results[0][2], results[1][2])
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        # Solved to 1e-12 at damping 1 and eigenvalues below 10.
        assert float((a - b).abs().max()) <= 1e-10 * float(b.abs().max())
    direct = AutogradInfluenceModule(it.model, it.objective, it.train_loader, None, "cpu", 1.0, cache=BUDGET)
    assert type(direct._problem._curvature[1]) is LinearHead
    assert_close(direct.hess, reference(it), operations=SWEEPS * N * WIDTH)


@pytest.mark.parametrize("cache", [False, N * 8 * FEATURES - 1, N * 8 * (FEATURES + CLASSES**2) - 1])
def test_what_does_not_fit_is_plain(cache: Any) -> None:
    """Nothing, not the inputs, and not the blocks: graphs would hold on to the batches."""
    it = module(Images(), quartic, cache=cache)
    rows = torch.randn(3, it._problem.space.size, dtype=torch.float64)
    assert_products(it.hvp(rows), rows, reference(it))
    assert isinstance(it._problem._curvature[1], Curvature)
    assert it._problem._curvature[1].kept_bytes == it._problem.train.kept_bytes == 0


def test_lissa_reads_its_sample_and_no_more() -> None:
    it = module(Images())
    of = it.train_loader
    lissa = LiSSAInfluenceModule(it.model, it.objective, of, None, "cpu", 0.5, 1, 1, 40.0, cache=BUDGET)
    lissa.on_failure = "ignore"  # a single step
    of.dataset.log.clear()
    lissa.inverse_hvp(torch.ones(it._problem.space.size, dtype=torch.float64))
    assert isinstance(lissa._problem._curvature[1], Curvature)
    assert not all(i in of.dataset.log for i in range(N))


# -- random data ------------------------------------------------------------------------------------------------------


def drawing(data: Images, index: int, x: Tensor) -> Tensor:
    torch.rand(1)
    return x


def flipping(data: Images, index: int, x: Tensor) -> Tensor:
    return x * (1.0 if float(torch.rand(())) < 0.5 else -1.0)


def test_random_data_are_not_captured() -> None:
    it = module(Images(drawing))
    rows = torch.randn(3, it._problem.space.size, dtype=torch.float64)
    assert_products(it.hvp(rows), rows, reference(it))
    assert isinstance(it._problem._curvature[1], Curvature)
    it = module(Images(flipping))
    with pytest.warns(UserWarning, match="other data each time"):
        first = it.hvp(rows)
    assert not torch.equal(it.hvp(rows), first)
    assert "other data each time" in it.explain()["curvature"].why_not[0][1]


def test_a_random_example_that_is_not_probed_differs_from_the_plain_products() -> None:
    """Random by numbers drawn before, of which nothing is seen; it is in the first batch, which is read again."""
    drawn = iter(torch.rand(1000).tolist())

    def hidden(data: Images, index: int, x: Tensor) -> Tensor:
        return x * next(drawn) if index == 1 else x

    it = module(Images(hidden))
    it.hvp(torch.ones(it._problem.space.size, dtype=torch.float64))
    assert "differ" in it._problem.curvature().why_no_head


# -- data that change -------------------------------------------------------------------------------------------------


def relabel(it: Any) -> None:
    it.train_loader.dataset.y[UNSEEN] = (it.train_loader.dataset.y[UNSEEN] + 1) % CLASSES
    it.train_loader.dataset.x[UNSEEN] *= -2.0


def replace(it: Any) -> None:
    it.train_loader.dataset.x = it.train_loader.dataset.x * 2.0


def twist(it: Any) -> None:
    it.train_loader.dataset.twist = lambda data, index, x: 2.0 * x


def shorten(it: Any) -> None:
    data = it.train_loader.dataset
    data.x, data.y = data.x[:-3], data.y[:-3]


def unnoticed(it: Any) -> None:
    it.train_loader.dataset.x.numpy()[UNSEEN] *= -2.0
    it.clear_cache()


@pytest.mark.parametrize("change", [relabel, replace, twist, shorten, unnoticed])
def test_data_that_change_are_captured_again(change: Callable[[Any], None]) -> None:
    it = module(Images())
    rows = torch.randn(3, it._problem.space.size, dtype=torch.float64)
    before = it.hvp(rows)
    assert type(it._problem._curvature[1]) is LinearHead
    change(it)
    matrix = reference(it)
    assert float((before - rows @ matrix).abs().max()) > 1e-4 * float(before.abs().max())
    for _ in range(2):
        assert_products(it.hvp(rows), rows, matrix)
    assert type(it._problem._curvature[1]) is LinearHead


def test_data_that_change_while_they_are_captured_are_not_taken() -> None:
    def aging(data: Images, index: int, x: Tensor) -> Tensor:
        x = x.clone()
        if data.old and index == UNSEEN:
            data.x[index] *= 2.0
        return x

    it = module(Images(aging))
    it.train_loader.dataset.old = True
    rows = torch.randn(3, it._problem.space.size, dtype=torch.float64)
    it.hvp(rows)
    assert "changed while" in it._problem.curvature().why_no_head
    assert isinstance(it._problem._curvature[1], Curvature)
    it.train_loader.dataset.old = False
    assert_products(it.hvp(rows), rows, reference(it))
    assert type(it._problem._curvature[1]) is LinearHead
