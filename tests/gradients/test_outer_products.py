"""Gradients of a linear layer's parameters, which are outer products: right when made, and when kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from heads import HEADS, NO_HEADS, Case, Doubled, N, classes, linear, uses
from oracles import assert_close, dense_hessian, example_gradients, loader_batches, query_gradients
from problems import Classification, module
from torch import Tensor, nn
from torch.nn import functional as F

from torch_influence import CGInfluenceModule
from torch_influence.gradients import _examples, _mean, pulled

pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore:.* over the batch, got something else",
    "ignore:the training loss has no curvature",
    "ignore:objective.train_loss is overridden",
    "ignore:params. (never gets|0.weight, 0.bias get) no gradient from any",
)

LAYERS = "inputs and output gradients of layers"
OUTER = "outer products at the linear layer"
KEPT = "inputs of the linear layer, captured, and slopes at its outputs, kept"
SWEEPS = 4  # forward, backward, the outer product and the product with a vector: sums of up to d terms each

# Not kept, since it is nothing that many examples at once give: vmap can't do it, or inputs depend on other examples.
NEVER = {"custom autograd function", "control flow by data", "padding"}

heads = pytest.mark.parametrize("name", HEADS)
precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def reference(case: Case, gradients: Callable[..., Tensor] = example_gradients) -> Tensor:
    """Gradients of batches of one, in float64, of the selected parameters [N, d]."""
    model, selected = case.model(), set(case.module().params_names)
    chosen = [torch.full((p.numel(),), name in selected) for name, p in model.named_parameters() if p.requires_grad]
    return gradients(model, case.objective, case.loader())[:, torch.cat(chosen)]


def assert_dots(scores: Tensor, gradients: Tensor, s: Tensor, inherent: float = 0.0) -> None:
    """Of gradients [m, d] and a vector, by 1/N."""
    size = float((gradients.abs() @ s.double().abs()).max()) / N
    operations = SWEEPS * gradients.shape[1]
    assert_close(scores, gradients @ s.double() / N, operations=operations, scale=size, inherent=inherent)


def path_of(it: CGInfluenceModule) -> str:
    return it.explain()["scores"].path


@heads
@precisions
def test_scores_first_and_again(name: str, dtype: torch.dtype) -> None:
    case = HEADS[name]
    it, gradients, order = case.module(dtype), reference(case), torch.randperm(N).tolist()
    s = torch.randn(gradients.shape[1]).to(dtype)
    it.hvp(s)  # makes the curvature
    first = path_of(it)
    assert first != KEPT
    assert path_of(it) == first, "explain() keeps nothing"
    assert_dots(it.influences(range(N), None, stest=s), gradients, s, case.inherent)
    assert (path_of(it) == KEPT) == (name not in NEVER)
    for some in (range(N), order, order[:5], [7], range(3, 9)):
        assert_dots(it.influences(some, None, stest=s), gradients[list(some)], s, case.inherent)


@heads
@precisions
def test_rows_first_and_again(name: str, dtype: torch.dtype) -> None:
    case = HEADS[name]
    it, gradients, paths = case.module(dtype), reference(case), []
    it.hvp(it.flat_parameters())
    for some in (range(N), range(N), [5, 3, 16, 0]):
        with it._problem.session():
            examples = it._problem.train_gradients()
            for positions, rows in examples.rows(some):
                expected = gradients[[some[p] for p in positions]]
                size = float(gradients.abs().max())
                assert_close(rows, expected, operations=SWEEPS * rows.shape[1], scale=size, inherent=case.inherent)
        paths.append(examples.path)
    usual = {"custom autograd function", "control flow by data"}
    assert paths[0] == OUTER or name in usual
    assert paths[1:] == [KEPT, KEPT] or name in NEVER


@heads
def test_rows_of_queries(name: str) -> None:
    case = HEADS[name]
    it, gradients = case.module(), reference(case, query_gradients)
    with it._problem.session():
        rows = torch.empty_like(gradients)
        for positions, some in it._problem.test_gradients().rows(range(N)):
            rows[positions] = some
    size = float(gradients.abs().max())
    assert_close(rows, gradients, operations=SWEEPS * rows.shape[1], scale=size, inherent=case.inherent)


@pytest.mark.parametrize("name", ["cross-example", "statistic of the batch", "tied weights", "sequences", "used twice"])
def test_what_is_no_head_is_never_kept(name: str) -> None:
    case = NO_HEADS[name]
    it, gradients = case.module(), reference(case)
    s = torch.randn(gradients.shape[1], dtype=torch.float64)
    it.hvp(s)
    for _ in range(2):
        assert_dots(it.influences(range(N), None, stest=s), gradients, s)
        assert path_of(it) != KEPT


@pytest.mark.parametrize("gnh", [False, True])
def test_an_overridden_loss(gnh: bool) -> None:
    """Scores are of the loss that is overridden, and the curvature, for Gauss-Newton, of the other one."""
    case = Case(linear(), F.cross_entropy, classes, "", kind=Doubled, regularizer=lambda p: 0.0)
    it, gradients = case.module(gnh=gnh), reference(case)
    s = torch.randn(gradients.shape[1], dtype=torch.float64)
    it.hvp(s)
    for _ in range(2):
        assert_dots(it.influences(range(N), None, stest=s), gradients, s)
    assert path_of(it) == KEPT
    single = example_gradients(case.model(), Case(linear(), F.cross_entropy, classes, "").objective, case.loader())
    assert not torch.allclose(single, gradients)


def test_padded_inputs_are_seen() -> None:
    it = HEADS["padding"].module()
    it.hvp(it.flat_parameters())
    it.influences(range(N), None, stest=it.flat_parameters())
    kept = it._problem._curvature[1].examples
    assert "not those in its batch" in kept.why_not
    assert not kept.has([0])


def test_no_room_for_slopes() -> None:
    """Inputs, probabilities and weights fit the budget, and the slopes beside them don't."""
    case = HEADS["softmax"]
    enough = N * 8 * (4 + 3 + 1 + 3)
    for budget, path in ((enough, KEPT), (enough - 1, LAYERS)):
        it = case.module(cache=budget)
        it.hvp(it.flat_parameters())
        head = it._problem._curvature[1]
        assert head.title == "linear head"
        assert head.kept_bytes <= budget
        it.influences(range(N), None, stest=it.flat_parameters())
        assert path_of(it) == path


@pytest.mark.parametrize("at_once", [8, 2, 1])
def test_groups_of_any_size(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """17 examples are two groups of 8 and one more, which alone would not be kept; so groups have 7."""
    monkeypatch.setattr(_examples, "_MANY_EXAMPLES", at_once)
    monkeypatch.setattr(_examples, "_BYTES_OF_A_PASS", 1)
    monkeypatch.setattr(_examples, "_ROWS_OF_A_PRODUCT", 3)  # and are passed in parts
    case = HEADS["softmax"]
    it, gradients = case.module(), reference(case)
    s = torch.randn(gradients.shape[1], dtype=torch.float64)
    it.hvp(s)
    for _ in range(2):
        assert_dots(it.influences(range(N), None, stest=s), gradients, s)
    assert (path_of(it) == KEPT) == (at_once == 8)


class Spoilt(torch.autograd.Function):
    """The identity; for many at once it says that large numbers are none."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor) -> tuple[Tensor, int]:
        return Spoilt.apply(z) + torch.where(z.abs() > 20, torch.nan, 0.0), in_dims[0]


def test_what_many_at_once_make_infinite_is_not_kept() -> None:
    case = Case(uses(lambda head, x: Spoilt.apply(head(x))), F.mse_loss, lambda n: torch.randn(n, 3), "")
    data = case.loader()
    data.dataset.tensors[0][4] *= 100
    it = CGInfluenceModule(case.model(), case.objective, data, data, "cpu", 1.0)
    it.hvp(it.flat_parameters())
    s, gradients = torch.randn(15, dtype=torch.float64), example_gradients(case.model(), case.objective, data)
    assert case.model()(data.dataset.tensors[0]).abs().max(1).values.gt(20).nonzero().flatten().tolist() == [4]
    for _ in range(2):
        scores = it.influences(range(N), None, stest=s[: gradients.shape[1]])
        assert_dots(scores, gradients, s[: gradients.shape[1]])


class Steeper(Spoilt):
    """The identity; for many at once its derivative is 2 where numbers are large."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, z: Tensor) -> tuple[Tensor, int]:
        return Steeper.apply(z) + torch.where(z.abs() > 20, z - z.detach(), 0.0), in_dims[0]


def test_a_derivative_that_is_wrong_for_many_at_once_is_noticed_in_any_example() -> None:
    case = Case(uses(lambda head, x: Steeper.apply(head(x))), F.mse_loss, lambda n: torch.randn(n, 3), "")
    data = case.loader()
    data.dataset.tensors[0][4] *= 100  # not the first, the middle or the last
    it = CGInfluenceModule(case.model(), case.objective, data, data, "cpu", 1.0)
    it.hvp(it.flat_parameters())
    gradients = example_gradients(case.model(), case.objective, data)
    s = torch.randn(gradients.shape[1], dtype=torch.float64)
    for _ in range(2):
        assert_dots(it.influences(range(N), None, stest=s), gradients, s)


def test_an_example_that_is_not_finite_does_no_harm() -> None:
    case = HEADS["softmax"]
    data = case.loader()
    data.dataset.tensors[0][4] = torch.nan
    it = CGInfluenceModule(case.model(), case.objective, data, data, "cpu", 1.0, on_failure="ignore")
    it.hvp(it.flat_parameters())
    s = torch.randn(it.flat_parameters().numel(), dtype=torch.float64)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="not finite"):
            scores = it.influences(range(N), None, stest=s)
    assert scores.isnan().nonzero().flatten().tolist() == [4]
    rest = torch.arange(N) != 4
    assert_dots(scores[rest], example_gradients(case.model(), case.objective, data)[rest], s)


# -- what is kept is of the present state ------------------------------------------------------------------------------


def edited_data(it: CGInfluenceModule) -> None:
    it.train_loader.dataset.tensors[0][3] += 1.0


def edited_labels(it: CGInfluenceModule) -> None:
    labels = it.train_loader.dataset.tensors[1]
    labels[5] = (labels[5] + 1) % 3


def edited_parameters(it: CGInfluenceModule) -> None:
    with torch.no_grad():
        it.model.weight[0, 0] += 0.5


def other_weight_decay(it: CGInfluenceModule) -> None:
    it.objective.l2 = 0.2


def other_damping(it: CGInfluenceModule) -> None:
    it.damp = 0.3


def other_curvature(it: CGInfluenceModule) -> None:
    it.gnh = True


EDITS = [edited_data, edited_labels, edited_parameters, other_weight_decay, other_damping, other_curvature]


def logistic(**changes: Any) -> CGInfluenceModule:
    torch.manual_seed(1)
    return module(model=nn.Linear(4, 3).double(), **changes)


def dense_scores(it: CGInfluenceModule) -> Tensor:
    """[n, q] by a dense solve; the Gauss-Newton matrix of softmax regression is its Hessian."""
    A = dense_hessian(it.model, it.objective, loader_batches(it.train_loader))
    A = A + it.damp * torch.eye(len(A), dtype=A.dtype)
    queries = query_gradients(it.model, it.objective, it.test_loader)
    rows = example_gradients(it.model, it.objective, it.train_loader)
    return rows @ torch.linalg.solve(A, queries.mT) / len(rows)


def assert_scores(actual: Tensor, it: CGInfluenceModule) -> None:
    """To the tolerance of the solve, 1e-12 of residuals, by the condition number of at most 1e2."""
    expected = dense_scores(it)
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("cache", ["auto", 1500])  # the data are kept, or, for want of room, the inputs alone
def test_after_an_edit(edit: Callable[[CGInfluenceModule], None], cache: Any) -> None:
    it = logistic(objective=Classification(), cache=cache)
    assert_scores(it.influence_matrix(), it)
    assert_scores(it.influence_matrix(), it)
    if cache == "auto":
        assert path_of(it) == KEPT
    before = dense_scores(it)
    edit(it)
    for _ in range(2):
        assert_scores(it.influence_matrix(), it)
    assert edit is other_curvature or not torch.allclose(dense_scores(it), before)


def test_clear_cache_drops_it() -> None:
    it = logistic()
    it.influence_matrix()
    assert path_of(it) == KEPT
    it.clear_cache()
    assert path_of(it) == LAYERS


def test_damping_keeps_it() -> None:
    it = logistic()
    it.influence_matrix()
    it.damp = 0.3
    assert path_of(it) == KEPT


def test_self_influences_rankings_and_fewer_examples_than_queries() -> None:
    it = logistic()
    n, some = 23, [20, 3, 11]
    A = dense_hessian(it.model, it.objective, loader_batches(it.train_loader)) + torch.eye(15, dtype=torch.float64)
    g = example_gradients(it.model, it.objective, it.train_loader)
    own = (g * torch.linalg.solve(A, g.mT).mT).sum(1) / n
    expected = dense_scores(it)
    for _ in range(2):
        assert (it.self_influences() - own).abs().max() <= 1e-10 * own.abs().max()
        assert (it.self_influences(some) - own[some]).abs().max() <= 1e-10 * own.abs().max()
        assert (it.influence_matrix(some) - expected[some]).abs().max() <= 1e-10 * expected.abs().max()
        assert_scores(it.influence_matrix(), it)
        top = it.influence_matrix(top_k=4)
        assert torch.equal(top.helpful.indices, expected.topk(4, dim=0).indices.mT)
        assert torch.equal(top.harmful.indices, expected.topk(4, dim=0, largest=False).indices.mT)
    with pytest.raises(ValueError, match="train_idxs"):
        it.influences([1, 1], [0])
    with pytest.raises(IndexError, match="train_idxs"):
        it.influences([n], [0])


class Counting(Classification):
    def __init__(self) -> None:
        self.calls: list[int] = []

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls.append(len(batch[0]))
        return super().train_outputs(model, batch)


def test_what_is_known_takes_no_pass_over_the_data() -> None:
    it = logistic(objective=Counting())
    s = it.stest([0])
    it.influences(range(23), None, stest=s)
    with it.frozen():
        count = len(it.objective.calls)
        scores = it.influences([*range(10), 15], None, stest=s)
        assert len(it.objective.calls) == count
    gradients = example_gradients(it.model, it.objective, it.train_loader, [*range(10), 15])
    assert (scores - gradients @ s / 23).abs().max() <= 1e-14 * float((gradients.abs() @ s.abs()).max())


# -- pull-backs -------------------------------------------------------------------------------------------------------


def test_few_outputs_are_pulled_back_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    outputs, unused = x.sin() * x.square().sum(1, keepdim=True), torch.ones(2, requires_grad=True)
    v = torch.randn(5, 3, dtype=torch.float64)
    few = pulled([outputs], [x, unused], [v])
    monkeypatch.setattr(_mean, "_FEW", 0)
    many = pulled([outputs], [x, unused], [v])
    assert torch.equal(few[0], many[0])
    assert few[0].any()
    assert not few[1].any()
