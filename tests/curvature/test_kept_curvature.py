"""What a curvature keeps from product to product: used again, within its budget, never stale."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import Supervised, assert_close, dense_gauss_newton, dense_hessian, loader_batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from torch_influence import CGInfluenceModule, LiSSAInfluenceModule
from torch_influence.curvature import Curvature, GaussNewton, Hessian, LinearHead
from torch_influence.gradients._mean import saved_bytes

# Losses that couple the examples of a batch are among the cases; test_errors.py has what is said of them.
pytestmark = pytest.mark.filterwarnings("error", "ignore:.* over the batch, got something else")

N, BATCH = 17, 5  # the last batch has 2
SWEEPS = 4  # forward, backward, and the two of the second derivative
PROBED = 3  # examples of each data set that every call looks at


class Network(nn.Module):
    """A head, with or without a layer before it, and a buffer."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh()) if layers == 2 else nn.Identity()
        self.head = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x)) * self.scale


def network(layers: int, dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(1)
    return Network(layers).to(dtype)


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """Keeps batches apart."""
    return F.cross_entropy(outputs, targets, weight=torch.tensor([0.2, 1.0, 3.0], dtype=outputs.dtype))


class Counted(Supervised):
    """Counts evaluations of the model, and may be interrupted in one of them."""

    def __init__(self, loss: Any = F.cross_entropy) -> None:
        super().__init__(loss, l2=0.05)
        self.calls = [0]  # a list: a number that changes would be a new setting of the objective
        self.interrupted_at = [-1]

    def train_outputs(self, model: nn.Module, batch: Any) -> Any:
        self.calls[0] += 1
        if self.calls == self.interrupted_at:
            raise KeyboardInterrupt
        return super().train_outputs(model, batch)


class Examples(Dataset):
    """In NumPy, whose edits are not noticed."""

    def __init__(self, n: int = N) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(n, 4, generator=generator, dtype=torch.float64).numpy()
        self.y = torch.randint(3, (n,), generator=generator).numpy()
        self.reads = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.x[index], self.y[index]


def loader(n: int = N) -> DataLoader:
    return DataLoader(Examples(n), batch_size=BATCH)


def tensors(n: int = N) -> DataLoader:
    examples = Examples(n)
    return DataLoader(TensorDataset(torch.tensor(examples.x), torch.tensor(examples.y)), batch_size=BATCH)


def module(layers: int, objective: Supervised, train: DataLoader, gnh: bool = False, **options: Any) -> Any:
    return CGInfluenceModule(network(layers), objective, train, tensors(7), "cpu", 1.0, gnh, rtol=1e-12, **options)


def reference(layers: int, objective: Supervised, gnh: bool) -> Tensor:
    return (dense_gauss_newton if gnh else dense_hessian)(network(layers), objective, loader_batches(tensors()))


def assert_products(actual: Tensor, rows: Tensor, matrix: Tensor) -> None:
    size = float((rows.abs() @ matrix.abs()).max())
    assert_close(actual, rows @ matrix, operations=SWEEPS * N * len(matrix), scale=size)


both = pytest.mark.parametrize("layers", [1, 2], ids=["head", "network"])
losses = pytest.mark.parametrize("loss", [F.cross_entropy, weighted], ids=["grouped", "apart"])
kinds = pytest.mark.parametrize("gnh", [False, True], ids=["hessian", "gauss-newton"])

# -- used again -------------------------------------------------------------------------------------------------------


@both
@losses
@kinds
@pytest.mark.parametrize("k", [1, 5])
def test_the_second_product_reads_and_evaluates_nothing(layers: int, loss: Any, gnh: bool, k: int) -> None:
    objective, train = Counted(loss), loader()
    it, matrix = module(layers, objective, train, gnh), reference(layers, Supervised(loss, 0.05), gnh)
    rows = torch.randn(k, len(matrix), dtype=torch.float64)
    first = it.hvp(rows)
    assert type(it._problem._curvature[1]) is (LinearHead if layers == 1 else GaussNewton if gnh else Hessian)
    train.dataset.reads = objective.calls[0] = 0
    assert torch.equal(it.hvp(rows), first)
    assert objective.calls == [4]  # examples that each outermost call evaluates, to see whether anything has changed
    assert train.dataset.reads == PROBED
    with it.frozen():
        train.dataset.reads = objective.calls[0] = 0
        assert torch.equal(it.hvp(rows), first)
        assert objective.calls == [train.dataset.reads] == [0]
    assert_products(first, rows, matrix)


@kinds
@pytest.mark.parametrize("k", [1, 5])
def test_a_budget_keeps_the_first_batches(gnh: bool, k: int) -> None:
    objective = Counted(weighted)
    it, matrix = module(2, objective, tensors(), gnh), reference(2, Supervised(weighted, 0.05), gnh)
    rows = torch.randn(k, len(matrix), dtype=torch.float64)

    def with_budget(budget: float) -> Curvature:
        operator = (GaussNewton if gnh else Hessian)(it._problem.evaluation, it._problem.train, it.device, budget)
        for _ in range(2):
            assert_products(operator.product(rows), rows, matrix)
        before = objective.calls[0]
        assert_products(operator.product(rows), rows, matrix)
        assert objective.calls[0] - before == -(-(N - operator.kept_examples) // BATCH)
        assert operator.kept_bytes <= budget
        return operator

    total = with_budget(float("inf")).kept_bytes
    assert 0 < total < 10**6
    kept = [with_budget(total * share // 12).kept_examples for share in range(13)]
    assert kept == sorted(kept)
    assert set(kept) == {0, 5, 10, 15, 17}


def unequal(items: list[Any]) -> Any:
    """Batches of several widths, of which only the first columns count."""
    x, y = default_collate(items)
    return F.pad(x, (0, int(y.sum()) % 3)), y


class Narrowed(Counted):
    def train_outputs(self, model: nn.Module, batch: Any) -> Any:
        return super().train_outputs(model, (batch[0][:, :4], batch[1]))


def test_what_the_budget_leaves_out_is_read_from_the_batches_that_are_kept() -> None:
    objective = Narrowed(weighted)
    train = DataLoader(Examples(), batch_size=BATCH, collate_fn=unequal)
    it, matrix = module(2, objective, train, cache=True), reference(2, Supervised(weighted, 0.05), False)
    rows = torch.randn(3, len(matrix), dtype=torch.float64)
    for _ in range(2):  # data, then graphs
        it.hvp(rows)
    assert it._problem.train.kept_bytes > 0
    assert it._problem.train.stacked() is None
    some = Hessian(it._problem.evaluation, it._problem.train, it.device, it._problem._curvature[1].kept_bytes // 2)
    assert_products(some.product(rows), rows, matrix)
    assert 0 < some.kept_examples < N
    train.dataset.reads = 0
    torch.manual_seed(4)
    assert_products(some.product(rows), rows, matrix)
    assert train.dataset.reads == 0
    state = torch.get_rng_state()
    torch.manual_seed(4)
    it.hvp(rows)
    assert torch.equal(torch.get_rng_state(), state)


@both
@losses
def test_an_interrupted_product_leaves_nothing_wrong(layers: int, loss: Any) -> None:
    matrix = reference(layers, Supervised(loss, 0.05), False)
    rows = torch.randn(2, len(matrix), dtype=torch.float64)
    objective = Counted(loss)
    whole = module(layers, objective, loader())
    whole.hvp(rows)
    for at in range(1, objective.calls[0] + 1, 3):
        objective = Counted(loss)
        it = module(layers, objective, loader())
        objective.interrupted_at[0] = at
        with pytest.raises(KeyboardInterrupt):
            it.hvp(rows)
        assert_products(it.hvp(rows), rows, matrix)
        assert_products(it.hvp(rows), rows, matrix)
        assert type(it._problem._curvature[1]) is type(whole._problem._curvature[1])
        assert it._problem._curvature[1].kept_bytes == whole._problem._curvature[1].kept_bytes
        if layers == 2:
            assert it._problem._curvature[1].batch_size == whole._problem._curvature[1].batch_size
            assert it._problem._curvature[1].kept_examples == N


@both
@losses
@pytest.mark.parametrize(("gnh", "own_generator"), [(False, True), (True, False)])
def test_seeded_lissa_does_not_depend_on_the_cache(layers: int, loss: Any, gnh: bool, own_generator: bool) -> None:
    depth, results, states = 12, [], []
    for cache in (False, True, 1500):
        generator = torch.Generator().manual_seed(6) if own_generator else None
        it = LiSSAInfluenceModule(
            *(network(layers), Supervised(loss, 0.05), loader(), tensors(7), "cpu", 0.5, 2, depth, 40.0, gnh),
            cache=cache,
            generator=generator,
            on_failure="ignore",  # so few steps
        )
        torch.manual_seed(4)
        v = torch.linspace(-1, 1, it._problem.space.size, dtype=torch.float64)
        results.append(torch.stack([it.hvp(v), it.hvp(v), it.inverse_hvp(v), it.stest([0, 3])]))
        states.append((torch.get_rng_state(), generator.get_state() if generator else torch.zeros(1)))
    for result, state in zip(results[1:], states[1:], strict=True):
        # h_t is at most t + 1 times as large as v; rounding in a step is at most that of a product.
        operations = depth * SWEEPS * BATCH * len(v)
        assert_close(result, results[0], operations=operations, scale=(depth + 1) * float(results[0].abs().max()))
        assert all(map(torch.equal, state, states[0]))


# -- stale ------------------------------------------------------------------------------------------------------------


def step(it: Any) -> None:
    for p in it.model.parameters():
        p.grad = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).reshape(p.shape)
    torch.optim.SGD(it.model.parameters(), lr=0.1).step()
    it.model.zero_grad()


def load(it: Any) -> None:
    it.model.load_state_dict({name: 0.5 * t for name, t in it.model.state_dict().items()})


def one_element(it: Any) -> None:
    it.model.head.weight.data[1, 2] += 0.5


def another_buffer(it: Any) -> None:
    it.model.scale = torch.tensor(2.0, dtype=torch.float64)


def relabel(it: Any) -> None:
    x, y = it.train_loader.dataset.tensors
    y[4:9] = (y[4:9] + 1) % 3
    x[4:9] *= 2.0


def swap_unnoticed(it: Any) -> None:
    it.train_loader.dataset.x[3:5] *= 3.0
    it.clear_cache()


CHANGES: dict[str, Callable[[Any], None]] = {
    "optimizer.step()": step,
    "load_state_dict": load,
    ".data of one element": one_element,
    "another tensor in place of a parameter's": lambda it: setattr(
        it.model.head.weight, "data", it.model.head.weight.data * 2.0
    ),
    ".data permuted": lambda it: it.model.head.weight.data.copy_(it.model.head.weight.data.flip(1)),
    "damp": lambda it: setattr(it, "damp", 2.0),
    "gnh": lambda it: setattr(it, "gnh", True),
    "buffer in place": lambda it: it.model.scale.fill_(2.0),
    "buffer .data": lambda it: it.model.scale.data.fill_(2.0),
    "buffer replaced": another_buffer,
    "objective.l2": lambda it: setattr(it.objective, "l2", 0.3),
    "objective.loss": lambda it: setattr(it.objective, "loss", functools.partial(F.cross_entropy, label_smoothing=0.2)),
    "data in place": relabel,
    "clear_cache()": swap_unnoticed,
}


def results(it: Any) -> Tensor:
    torch.manual_seed(7)
    v = torch.linspace(-1, 1, it._problem.space.size, dtype=torch.float64)
    return torch.cat([it.hvp(v), it.hvp(torch.stack([v, 2 * v]))[1], it.stest([0, 3]), it.influences(range(N), [2])])


@pytest.mark.parametrize(
    ("change", "layers", "solver", "loss"),
    [(change, 2, CGInfluenceModule, F.cross_entropy) for change in CHANGES]
    + [(change, 1, LiSSAInfluenceModule, weighted) for change in CHANGES if change != "gnh"],
)
def test_nothing_is_stale(layers: int, change: str, solver: Any, loss: Any) -> None:
    # Bits are compared, so a few steps do.
    options: dict[str, Any] = {"rtol": 1e-2} if solver is CGInfluenceModule else {"repeat": 1, "depth": 4, "scale": 40}
    options["on_failure"] = "ignore"
    train = loader() if change == "clear_cache()" else tensors()
    it = solver(network(layers), Supervised(loss, 0.05), train, tensors(7), "cpu", damp=1.0, **options)
    before = results(it)
    assert it._problem._curvature[1].kept_bytes > 0
    CHANGES[change](it)
    after = results(it)
    fresh = solver(it.model, it.objective, train, it.test_loader, "cpu", damp=it.damp, gnh=it.gnh, **options)
    assert torch.equal(after, results(fresh))
    assert float((after - before).abs().max()) > 1e-4 * float(before.abs().max())
    assert torch.equal(results(it), after)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_saved_bytes_of_a_known_graph() -> None:
    data = torch.randn(10, 3, dtype=torch.float64)
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    x = data.clone().requires_grad_()
    assert saved_bytes([w]) == 0
    assert saved_bytes([data.clone() @ w]) == data.nbytes  # for the gradient of w
    assert saved_bytes([x @ w]) == data.nbytes + w.nbytes
    y = (x @ w).tanh()
    assert saved_bytes([y]) == data.nbytes + w.nbytes + y.nbytes
    assert saved_bytes([y, y.sum()]) == saved_bytes([y])  # once each
    assert saved_bytes([data[2:4] @ w]) == data.nbytes  # all of it is held
    assert saved_bytes([(data[2:4] @ w).tanh()], {"x": [data], "w": w}) == 2 * 2 * 8  # it is there anyway
    assert saved_bytes([data[2:4] @ w], besides=(data[:1],)) == 0


@both
@losses
@kinds
def test_what_is_kept_does_not_grow_beyond_the_budget(layers: int, loss: Any, gnh: bool) -> None:
    cache = 8000
    kept = []
    for n in (20, 100, 240):  # data take 40 bytes each, and the graphs more
        it = module(layers, Supervised(loss, 0.05), tensors(n), gnh, cache=cache)
        it.hvp(torch.ones(it._problem.space.size, dtype=torch.float64))
        kept.append(it._problem._curvature[1].kept_bytes + it._problem.train.kept_bytes)
    assert max(kept) <= 2 * cache
    assert kept[0] > 20 * 40  # data, and more
    assert kept[-1] == 0  # not even the data fit
