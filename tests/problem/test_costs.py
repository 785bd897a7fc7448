"""What is computed, read and waited for, counted: what a timing would only hint at.

A dispatched operation that is no view is a launch on a GPU. What is done once, before and after the iterations, drops
out of the difference between two solves that differ by some iterations.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import Supervised, with_spectrum
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from torch_influence import CGInfluenceModule, InfluenceModule, LiSSAInfluenceModule, backend_info
from torch_influence.linop import Dense
from torch_influence.solvers import block_cg, cg, lissa, minres

needs_native = pytest.mark.skipif(not backend_info().ops, reason=f"no native ops: {backend_info().cpu}")

INPUTS, CLASSES, BATCH, QUERIES = 6, 3, 8, 5
PROBED = 3  # examples that every call looks at: the first, the middle and the last, for edits of the data
NOTHING = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "promote_types"}
ON_THE_HOST = {"random_"}  # a DataLoader's own draw from torch's generator, as each pass over it makes
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item"}


class Operations(TorchDispatchMode):
    """Counts by name what computes, and what a GPU's host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        namespace = func._schema.name.partition("::")[0]
        returns = func._schema.returns
        view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        masks = name in ("index", "index_put_") and any(t is not None and t.dtype is torch.bool for t in args[1])
        if name in WAITS or masks:
            self.waits += 1
        elif namespace in ("aten", "torch_influence") and not view and name not in NOTHING | ON_THE_HOST:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


def per_step(solve: Callable[[int], Any], few: int, many: int) -> tuple[dict[str, float], float]:
    """Launches by name, and waits, that one more step takes."""
    solve(few)  # what is made at the first use is there
    counted = []
    for steps in (few, many):
        with Operations() as operations:
            solve(steps)
        counted.append(operations)
    before, after = counted
    names = before.launches.keys() | after.launches.keys()
    steps = many - few
    launches = {name: (after.launches[name] - before.launches[name]) / steps for name in names}
    return {name: each for name, each in launches.items() if each}, (after.waits - before.waits) / steps


class Read(Dataset):
    """Counts the examples that are read."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, INPUTS, dtype=torch.float64, generator=generator)
        self.y = torch.randint(CLASSES, (n,), generator=generator)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return self.x[index], self.y[index]


def network(layers: int) -> nn.Sequential:
    torch.manual_seed(1)
    if layers == 1:
        return nn.Sequential(nn.Linear(INPUTS, CLASSES)).double()
    return nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


class Counted:
    """A module, with counts of the examples that it reads and of the passes through its network."""

    def __init__(self, kind: Any, layers: int = 1, n: int = 24, **options: Any) -> None:
        self.train, self.test = Read(n, 0), Read(QUERIES, 1)
        loaders = DataLoader(self.train, batch_size=BATCH), DataLoader(self.test, batch_size=2)
        net = network(layers)
        self.module = kind(net, Supervised(F.cross_entropy, 0.05), *loaders, "cpu", 1.0, **options)  # definite
        self.module.on_failure = "ignore"
        self.passes = 0
        net.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.passes += 1

    def spent(self, act: Callable[[], Any]) -> tuple[int, int, int]:
        """Training and test examples read, and passes through the network."""
        before = self.train.reads, self.test.reads, self.passes
        act()
        return self.train.reads - before[0], self.test.reads - before[1], self.passes - before[2]


def rows_like(module: Any, k: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(k, module._problem.space.size, dtype=torch.float64, generator=generator)


# -- an iteration -----------------------------------------------------------------------------------------------------


def test_the_counter_sees_views_waits_and_what_autograd_runs() -> None:
    x = torch.ones(3, requires_grad=True)
    with Operations() as operations:
        (gradient,) = torch.autograd.grad(x.exp().sum(), x, create_graph=True)
        torch.autograd.grad(gradient.view(3, 1).sum(), x)
    assert operations.launches["exp"] == 1
    # One in the first backward pass, two in the second, which on the CPU run in the calling thread.
    assert operations.launches["mul"] == 3
    assert not operations.launches.keys() & {"view", "expand", "detach"}
    assert operations.waits == 0
    with Operations() as operations:
        x.detach()[x.detach() > 0].sum().item()
    assert operations.waits == 2


CG_STEP = {
    "cg_step": 1,  # all the vector work
    "add_": 1,  # the damping
    "clone": 1,  # the step's scalars, for the log
    "all": 1,  # whether some row is done: what is read, on a GPU a step late
}


def cg_on(counted: Counted, k: int = 4) -> Callable[[int], Any]:
    operator, rows = counted.module._problem.curvature().damped(1.0), rows_like(counted.module, k)
    return lambda steps: cg(operator, rows, rtol=0.0, maxiter=steps, on_failure="ignore")


@needs_native
def test_an_iteration_with_a_linear_head_takes_six_launches_and_a_wait() -> None:
    counted = Counted(CGInfluenceModule)
    with counted.module._problem.evaluation.session():
        launches, waits = per_step(cg_on(counted), 2, 8)
    assert launches == CG_STEP | {"linear_curvature_product": 1, "add_": 2}  # the regulariser besides
    assert waits == 1


@needs_native
@pytest.mark.parametrize("n", [24, 240])
def test_an_iteration_with_kept_graphs_adds_nothing_to_their_product(n: int) -> None:
    """And their product computes no forward pass; it is one of all data, in as many batches as their graphs take."""
    counted = Counted(CGInfluenceModule, layers=2, n=n)
    with counted.module._problem.evaluation.session():
        launches, waits = per_step(cg_on(counted), 2, 8)
        operator, rows = counted.module._problem.curvature(), rows_like(counted.module)
        with Operations() as product:
            operator.product(rows)
    assert launches == dict(product.launches + collections.Counter(CG_STEP))
    assert waits == 1
    assert product.waits == 0
    assert product.launches["_log_softmax_backward_data"] > 0
    assert not product.launches.keys() & {"_log_softmax", "nll_loss_forward", "tanh", "addmm"}


def test_a_product_of_kept_graphs_launches_as_much_for_any_number_of_rows_and_examples() -> None:
    total = set()
    for n in (24, 240):
        counted = Counted(CGInfluenceModule, layers=2, n=n)
        with counted.module._problem.evaluation.session():
            operator = counted.module._problem.curvature()
            for k in (2, 7):
                rows = rows_like(counted.module, k)
                operator.product(rows)
                with Operations() as product:
                    operator.product(rows)
                total.add(tuple(sorted(product.launches.items())))
    assert len(total) == 1


@needs_native
def test_a_step_of_lissa_with_a_linear_head_takes_ten_operations_and_a_wait() -> None:
    counted = Counted(LiSSAInfluenceModule, repeat=1, depth=8, scale=20.0)
    rows = rows_like(counted.module)
    with counted.module._problem.evaluation.session():
        operator = counted.module._problem.curvature().damped(1.0)

        def solve(depth: int) -> None:
            generator = torch.Generator().manual_seed(0)
            lissa(operator, rows, depth=depth, scale=20.0, generator=generator, on_failure="ignore")

        launches, waits = per_step(solve, 64, 128)
    assert launches.pop("randint") < 1  # draws are made many at a time
    assert launches == {
        "linear_curvature_product": 1,
        "lissa_step": 1,  # the damping in it
        "add_": 1,  # the regulariser
        "index_select": 3,  # the minibatch's inputs, probabilities and weights
        "mul": 2,  # the weights of a mean over the minibatch; and the bound below
        "le": 1,  # on the host: whether |h|² is within its bound
        "all": 1,
    }
    assert waits == 1  # for |h|², on a GPU of the step before


@needs_native
@pytest.mark.parametrize("k", [1, 4])
def test_minres_waits_once_in_an_iteration(k: int) -> None:
    counted = Counted(CGInfluenceModule)
    with counted.module._problem.evaluation.session():
        operator, rows = counted.module._problem.curvature().damped(1.0), rows_like(counted.module, k)
        _, waits = per_step(lambda m: minres(operator, rows, rtol=0.0, maxiter=m, on_failure="ignore"), 2, 8)
    assert waits == 1


# -- products ---------------------------------------------------------------------------------------------------------


class Multiplied(Dense):
    """Counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.products = 0

    def product(self, rows: Tensor) -> Tensor:
        self.products += 1
        return super().product(rows)


@pytest.mark.parametrize("solver", [cg, block_cg, minres], ids=lambda solver: solver.__name__)
@pytest.mark.parametrize("guessed", [False, True])
def test_a_solve_takes_a_product_per_iteration_and_one_to_judge(solver: Any, guessed: bool) -> None:
    """One right-hand side: of several, those that end at the same time are judged together. A guess takes one more."""
    torch.manual_seed(0)
    operator = Multiplied(with_spectrum(torch.linspace(1.0, 3.0, 20, dtype=torch.float64)))
    row = torch.randn(20, dtype=torch.float64)
    options = {"x0": torch.ones_like(row)} if guessed else {}
    _, report = solver(operator, row, rtol=1e-6, **options)
    assert report.converged.all()
    assert operator.products == report.products == int(report.iterations) + 1 + guessed


def test_rows_that_end_together_are_judged_together() -> None:
    torch.manual_seed(0)
    operator = Multiplied(with_spectrum(torch.logspace(0.0, 1.0, 30, dtype=torch.float64)))
    _, report = cg(operator, torch.randn(8, 30, dtype=torch.float64), rtol=1e-6)
    ends = len(set(report.iterations.tolist()))
    assert 1 < ends < 8
    assert operator.products == report.products == int(report.iterations.max()) + ends


# -- a matrix of influences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_matrix_reads_the_data_once_and_the_next_nothing_but_three_probes(layers: int) -> None:
    cold = {}
    for n in (64, 128):
        counted = Counted(CGInfluenceModule, layers, n)
        cold[n] = counted.spent(counted.module.influence_matrix)
        # Three examples of either set are looked at, for edits of the data.
        assert counted.spent(counted.module.influence_matrix)[:2] == (PROBED, PROBED)
        assert counted.spent(lambda it=counted: it.module.influence_matrix(top_k=2))[:2] == (PROBED, PROBED)
    assert cold[128][0] - cold[64][0] == 64  # what else is read are probes, whatever the size


@pytest.mark.parametrize("layers", [1, 2])
def test_without_cache_each_product_is_a_pass_over_the_data_and_scoring_one_more(layers: int) -> None:
    n = 24
    counted = Counted(CGInfluenceModule, layers, n, cache=False)
    counted.module.influence_matrix()  # and what is verified once
    train, test, passes = counted.spent(counted.module.influence_matrix)
    products = counted.module.last_report.products
    assert train == n * (products + 1)
    assert test == QUERIES
    assert passes >= products * n // BATCH


@pytest.mark.parametrize("layers", [1, 2])
def test_without_cache_a_step_of_lissa_reads_a_minibatch(layers: int) -> None:
    n, depth = 24, 30
    counted = Counted(LiSSAInfluenceModule, layers, n, repeat=1, depth=depth, scale=20.0, cache=False)
    counted.module.influence_matrix()
    train = counted.spent(counted.module.influence_matrix)[0]
    assert train == n + depth * BATCH  # and a pass for the scores


@needs_native
@pytest.mark.parametrize("layers", [1, 2])
def test_a_warm_matrix_differentiates_each_example_once(layers: int) -> None:
    """However many queries: each layer's gradients meet all solutions in one call, for each tile of examples."""
    counts = {}
    for n in (64, 128):
        counted = Counted(CGInfluenceModule, layers, n)
        counted.module.influence_matrix()
        with Operations() as operations:
            passes = counted.spent(counted.module.influence_matrix)[2]
        counts[n] = passes, operations.launches["grad_dot"]
        report = counted.module.last_report
        assert operations.launches["cg_step"] == int(report.iterations.max())
    assert counts[64] == counts[128]
    assert counts[64][1] == layers


@needs_native
@pytest.mark.parametrize("n", [64, 128])
def test_a_matrix_of_a_block_solve_is_summed_up_on_the_way(n: int) -> None:
    """Scores take no product with the solutions: a forward and a backward pass verify them, and three examples."""
    counted = Counted(InfluenceModule, 2, n, gnh=True, solver="block", rtol=1e-6)
    counted.module.influence_matrix()
    with Operations() as operations:
        train, test, _ = counted.spent(counted.module.influence_matrix)
    assert (train, test) == (PROBED, PROBED)
    assert not operations.launches["grad_dot"]
    report = counted.module.last_report
    assert report.products == int(report.iterations.max()) + 1
    with Operations() as alone:
        counted.module.stests()
    tanhs = operations.launches["tanh"] - alone.launches["tanh"]
    # All losses, whose sum with signs is differentiated; what is compared; and a look at the operators on the way.
    assert tanhs == 1 + PROBED + 1


def test_without_cache_a_matrix_of_a_block_solve_reads_the_data_once_for_each_product_and_once_more() -> None:
    n = 24
    counted = Counted(InfluenceModule, 2, n, gnh=True, solver="block", rtol=1e-6, cache=False)
    counted.module.influence_matrix()
    train, test, _ = counted.spent(counted.module.influence_matrix)
    assert train == n * (counted.module.last_report.products + 1)
    assert test == QUERIES
    budget = counted.spent(lambda: counted.module.influence_matrix(max_products=2))
    assert budget[0] == n * 3
