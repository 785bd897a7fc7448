"""From bad input to the exact type and words of the error: one table, and the warnings beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import Classification, loader, module, network
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from torch_influence import (
    AutogradInfluenceModule,
    BaseInfluenceModule,
    CGInfluenceModule,
    DivergenceWarning,
    InfluenceModule,
    LiSSAInfluenceModule,
    NegativeCurvatureWarning,
)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield torch.zeros(4), 0


class PerExampleLoss(Classification):
    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1], reduction="none")


class DetachedLoss(Classification):
    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return super().test_loss(model, params, batch).detach()


class NumberLoss(Classification):
    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Any:
        return super().test_loss(model, params, batch).item()


def objective(**methods: Any) -> Classification:
    """A classification in which some methods are others."""
    return type("Changed", (Classification,), methods)()  # type: ignore[no-any-return]


def regularizer(value: Callable[[Tensor], Any]) -> Classification:
    return objective(train_regularization=lambda self, params: value(params))


def train_loss(value: Callable[[Tensor], Any]) -> Classification:
    return objective(train_loss_on_outputs=lambda self, outputs, batch: value(F.cross_entropy(outputs, batch[1])))


def scores(changed: Classification, **options: Any) -> Tensor:
    return module(objective=changed, **options).influences([0, 1], [0])


class PairOutputs(Classification):
    def train_outputs(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]), None

    def train_loss_on_outputs(self, outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs[0], batch[1])


class Concave(Classification):
    l2 = -10.0


class Flat(Classification):
    l2 = 0.0

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.mean()


def frozen() -> nn.Module:
    return network().requires_grad_(False)


def linear() -> nn.Module:
    return nn.Linear(4, 3, dtype=torch.float64)


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LazyBatchNorm1d(affine=False), nn.Linear(5, 3))


def with_parameter(p: Tensor) -> nn.Module:
    model = network()
    model.register_parameter("scale", nn.Parameter(p))
    return model


def own(solve: Callable[[Tensor], Any]) -> Any:
    return module(type("Own", (BaseInfluenceModule,), {"inverse_hvp": lambda self, vec: solve(vec)}))


def selecting(choose: Callable[[nn.Sequential], Any]) -> Any:
    model = network()
    return module(model=model, params=choose(model))


NAN = float("nan")

ERRORS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    # indices
    ("twice", lambda: module().influences([1, 2, 1], [0]), ValueError, "train_idxs: expected distinct indices, got 1 more than once"),
    ("twice in queries", lambda: module().stest([2, 2]), ValueError, "test_idxs: expected distinct indices, got 2 more than once"),
    ("too large", lambda: module().influences([23], [0]), IndexError, "train_idxs: expected indices in [0, 23), got 23"),
    ("negative", lambda: module().test_loss_grad([-1]), IndexError, "test_idxs: expected indices in [0, 7), got -1"),
    ("one number", lambda: module().influences(3, [0]), ValueError, "train_idxs: expected a 1-D sequence of indices, got 3; write [3]"),
    ("nested", lambda: module().influences([[1, 2]], [0]), ValueError, "train_idxs: expected a 1-D sequence of indices, got a nested one"),
    ("2-D array", lambda: module().influences(np.ones((2, 2), int), [0]), ValueError, "train_idxs: expected a 1-D sequence of indices"),
    ("floats", lambda: module().influences([1.5], [0]), TypeError, "train_idxs: expected integer indices, got 1.5 of float"),
    ("mask", lambda: module().influences(torch.ones(23) > 0, [0]), TypeError, "train_idxs: expected integer indices, got a boolean mask; use mask.nonzero().flatten()"),
    ("text", lambda: module().influences("12", [0]), ValueError, "train_idxs: expected a 1-D sequence of indices, got '12'"),
    ("None", lambda: module().influences(None, [0]), ValueError, "train_idxs: expected indices, got None"),
    ("no query", lambda: module().influences([0], []), ValueError, "test_loss_grad: expected at least one index, got none"),
    ("no query at all", lambda: module().influences([0], None), ValueError, "test_idxs: expected indices of test examples, got None without an stest"),
    ("mean of nothing", lambda: module().train_loss_grad([]), ValueError, "train_loss_grad: expected at least one index, got none"),
    # shapes
    ("stest of wrong length", lambda: module().influences([0], None, torch.ones(3)), ValueError, "stest: expected shape [43], got [3]"),
    ("stest of rows", lambda: module().influences([0], None, torch.ones(2, 43)), ValueError, "stest: expected shape [43], got [2, 43]"),
    ("stest no tensor", lambda: module().influences([0], None, [1.0]), TypeError, "stest: expected a tensor, got list"),
    ("vec of wrong length", lambda: module().inverse_hvp(torch.ones(42)), ValueError, "vec: expected shape [43] or [k, 43], got [42]"),
    ("vec of three axes", lambda: module().hvp(torch.ones(1, 1, 43)), ValueError, "vecs: expected shape [43] or [k, 43], got [1, 1, 43]"),
    # data
    ("iterable data", lambda: module(train_loader=DataLoader(Stream())), TypeError, "train_loader: expected a data set with __len__ and __getitem__, got Stream"),
    ("no loader", lambda: module(train_loader=[1, 2]), TypeError, "train_loader: expected a torch.utils.data.DataLoader, got list"),
    ("no test loader", lambda: module(test_loader=None).stest([0]), TypeError, "test_loader: expected a torch.utils.data.DataLoader, got NoneType"),
    ("no data", lambda: module(train_loader=loader(n=0)), ValueError, "train_loader: expected at least one example, got an empty data set"),
    # objective
    ("class for instance", lambda: module(objective=Classification), TypeError, "objective: expected an instance, got the class Classification; write Classification()"),
    ("loss for objective", lambda: module(objective=F.cross_entropy), TypeError, "objective: expected a BaseObjective, got function; a loss is called in its train_loss_on_outputs and test_loss"),
    ("loss layer for objective", lambda: module(objective=nn.MSELoss()), TypeError, "objective: expected a BaseObjective, got MSELoss; a loss is called in"),
    ("class of a loss", lambda: module(objective=nn.MSELoss), TypeError, "objective: expected a BaseObjective, got the class MSELoss; a loss is called in"),
    ("no objective", lambda: module(objective=None), TypeError, "objective: expected a BaseObjective, got NoneType; no train_outputs, train_loss_on_outputs, train_regularization, train_loss, test_loss"),
    ("objective set later", lambda: setattr(module(), "objective", F.cross_entropy), TypeError, "objective: expected a BaseObjective, got function"),
    ("test_loss of two arguments", lambda: module(objective=objective(test_loss=lambda self, model, batch: 0)), TypeError, "objective: expected test_loss(model, params, batch), got test_loss(model, batch)"),
    ("model and objective swapped", lambda: module(model=Classification(), objective=network()), TypeError, "model: expected a torch.nn.Module, got Classification; model and objective are swapped, the order is (model, objective, train_loader, test_loader, device)"),
    ("objective and loader swapped", lambda: module(objective=loader(), train_loader=Classification()), TypeError, "objective: expected a BaseObjective, got DataLoader; objective and train_loader are swapped"),
    ("model for loader", lambda: module(train_loader=network()), TypeError, "train_loader: expected a torch.utils.data.DataLoader, got Sequential; that is what model takes"),
    ("no return of regulariser", lambda: scores(regularizer(lambda p: None)), TypeError, "train_regularization: expected a scalar tensor or a number, got NoneType; return 0.0 where there is none"),
    ("no return of regulariser, gnh", lambda: scores(regularizer(lambda p: None), gnh=True), TypeError, "train_regularization: expected a scalar tensor or a number, got NoneType"),
    ("regulariser a vector", lambda: scores(regularizer(lambda p: 0.5 * p.square())), ValueError, "train_regularization: expected a scalar tensor or a number, got shape (43,); sum it"),
    ("regulariser a tuple", lambda: scores(regularizer(lambda p: (p.sum(), 1))), TypeError, "train_regularization: expected a scalar tensor or a number, got tuple"),
    ("regulariser complex", lambda: scores(regularizer(lambda p: p.sum() * 1j)), TypeError, "train_regularization: expected a scalar tensor or a number, got torch.complex128"),
    ("regulariser nan", lambda: scores(regularizer(lambda p: NAN)), ValueError, "train_regularization: expected a scalar tensor or a number, got nan"),
    ("regulariser nan as tensor", lambda: scores(regularizer(lambda p: p.sum() * NAN)), ValueError, "train_regularization: expected a finite number, got nan"),
    ("regulariser by item", lambda: scores(regularizer(lambda p: p.square().sum().item())), ValueError, "train_regularization: its value depends on the parameters, but has no graph"),
    ("regulariser detached", lambda: scores(regularizer(lambda p: p.detach().norm()), gnh=True), ValueError, "train_regularization: its value depends on the parameters, but has no graph"),
    ("no return of loss", lambda: scores(train_loss(lambda loss: None)), TypeError, "train_loss_on_outputs: expected a scalar tensor (the mean loss over the batch), got NoneType; does it return?"),
    ("loss complex", lambda: scores(train_loss(lambda loss: loss * 1j)), TypeError, "of real floating-point numbers, got torch.complex128"),
    ("loss integer", lambda: scores(train_loss(lambda loss: loss.long())), TypeError, "train_loss_on_outputs: expected a scalar tensor (the mean loss over the batch) of real floating-point numbers, got torch.int64"),
    ("no return of outputs", lambda: scores(objective(train_outputs=lambda self, model, batch: None)), TypeError, "train_outputs: expected what train_loss_on_outputs takes, got None; does it return?"),
    ("loss per example", lambda: module(objective=PerExampleLoss()).train_loss_grad([0, 1]), ValueError, "train_loss_on_outputs: expected a scalar (the mean loss over the batch), got shape (5,); reduce it with .mean()"),
    ("detached loss", lambda: module(objective=DetachedLoss()).stest([0]), ValueError, "expected a loss that depends on what it is differentiated by"),
    ("detached loss, many queries", lambda: module(objective=DetachedLoss()).stests(), ValueError, "expected a loss that depends on what it is differentiated by"),
    ("loss as a number", lambda: module(objective=NumberLoss()).stest([0]), TypeError, "test_loss: expected a scalar tensor (the mean loss over the batch), got float"),
    ("outputs no tensor", lambda: module(objective=PairOutputs(), gnh=True).stest([0]), TypeError, "train_outputs: expected a tensor with gnh=True, got tuple"),
    # model and parameters
    ("no module", lambda: module(model=lambda x: x), TypeError, "model: expected a torch.nn.Module, got function"),
    ("no module, a state", lambda: module(model=network().state_dict()), TypeError, "model: expected a torch.nn.Module, got OrderedDict; load it into a model first"),
    ("no module, a path", lambda: module(model="model.pt"), TypeError, "model: expected a torch.nn.Module, got str; load the model from there first"),
    ("no module, a class", lambda: module(model=nn.Linear), TypeError, "model: expected a torch.nn.Module, got the class Linear; build one"),
    ("lazy parameter", lambda: module(model=nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3))), ValueError, "model: 0.weight has no shape yet, it belongs to a lazy layer: run one batch through the model first"),
    ("lazy buffer", lambda: module(model=lazy()), ValueError, "model: 1.running_mean has no shape yet"),
    ("meta", lambda: module(model=nn.Linear(4, 3, device="meta")), ValueError, "model: weight is on the meta device and has no values: load them first"),
    ("complex parameter", lambda: module(model=with_parameter(torch.ones(2) * 1j), params="0.*"), TypeError, "model: expected real floating-point parameters, got scale with dtype torch.complex64"),
    ("no parameters", lambda: module(model=nn.Tanh()), ValueError, "got none; it has no parameters at all"),
    ("no device", lambda: module(device=None), TypeError, "device: expected a torch.device or the name of one, as 'cpu' or 'cuda:0', got None"),
    ("unknown device", lambda: module(device="gpu"), TypeError, "device: expected a torch.device or the name of one, as 'cpu' or 'cuda:0', got 'gpu'"),
    ("device that is not there", lambda: module(device="cuda:99"), ValueError, "device: 'cuda:99' can't be used here ("),
    ("device without values", lambda: module(device="meta"), ValueError, "device: tensors on 'meta' have no values"),
    ("nothing to train", lambda: module(model=frozen()), ValueError, "model: expected at least one parameter with requires_grad=True, got none"),
    ("nothing in what is trained", lambda: module(model=nn.PReLU(0)), ValueError, "model: expected at least one number to differentiate by, got only parameters of size 0: weight"),
    ("nothing in what is selected", lambda: module(model=nn.Sequential(nn.PReLU(0), nn.Linear(4, 3)), params="0.weight"), ValueError, "params: expected at least one number to differentiate by, got only parameters of size 0: 0.weight"),
    ("unknown name", lambda: module(params="3.weight"), ValueError, "params: got '3.weight', which is no parameter of the model; choose among 0.weight, 0.bias, 2.weight, 2.bias"),
    ("frozen name", lambda: module(model=half_frozen(), params="0.weight"), ValueError, "params: got '0.weight', which has requires_grad=False; choose among 2.weight, 2.bias"),
    ("foreign parameter", lambda: module(params=[nn.Parameter(torch.ones(2))]), ValueError, "params: got a tensor of shape (2,), which is no parameter of the model"),
    ("nothing selected", lambda: module(params=[]), ValueError, "params: expected at least one name, glob or Parameter, got an empty selection"),
    ("predicate selects nothing", lambda: module(params=lambda name, p: False), ValueError, "params: the predicate chose none of the trainable parameters"),
    ("module as selection", lambda: selecting(lambda model: model[2]), TypeError, "params: expected names, globs or Parameters, got Linear; write '2.*', or list(module.parameters())"),
    ("the model as selection", lambda: selecting(lambda model: model), TypeError, "got Sequential, the model itself; leave params out"),
    ("modules as selection", lambda: selecting(lambda model: [model[2]]), TypeError, "got Linear; write '2.*'"),
    ("another module as selection", lambda: module(params=network()), TypeError, "got Sequential; write a glob of its name, as 'head.*'"),
    ("name of a module", lambda: module(params="2"), ValueError, "params: got '2', which is a module, and no parameter; write '2.*'"),
    ("number as selection", lambda: module(params=3), TypeError, "params: expected names, globs or Parameters, got int 3"),
    ("bool as selection", lambda: module(params=False), TypeError, "params: expected names, globs or Parameters, got bool False"),
    ("dict as selection", lambda: module(params={"0.weight": False}), TypeError, "params: expected names, globs or Parameters, got dict; write list(...) for its keys"),
    ("pairs as selection", lambda: selecting(lambda model: model.named_parameters()), TypeError, "got tuple; of pairs (name, parameter) give either"),
    ("values as selection", lambda: selecting(lambda model: model[0].weight.data), ValueError, "params: got a tensor of shape (5, 4), which is no parameter of the model"),
    ("iterator at its end", lambda: module(params=iter(())), ValueError, "got an empty selection, or an iterator at its end"),
    ("method as selection", lambda: selecting(lambda model: model.parameters), TypeError, "params: expected a predicate f(name, parameter), got one of other arguments"),
    ("predicate of tensors", lambda: module(params=lambda name, p: p > 0), TypeError, "params: expected a predicate that tells True or False, got a tensor for 0.weight"),
    ("selection by number", lambda: module(params=[0]), TypeError, "params: expected names, globs or Parameters, got int"),
    # solvers
    ("a solver of one's own, no tensor", lambda: own(lambda v: v.numpy()).stests([0, 1]), TypeError, "inverse_hvp: expected it to return a tensor, got ndarray"),
    ("a solver of one's own, shape", lambda: own(lambda v: v[None]).stests([0, 1]), ValueError, "inverse_hvp: expected it to return shape [43], got [1, 43]"),
    ("a model for its training", lambda: module().verify(fit=network(), print=False), TypeError, "fit: expected a function that trains another model, got Sequential"),
    ("negative damping", lambda: module(damp=-0.5), ValueError, "damp: expected a number >= 0, got -0.5; module.suggest_damping() finds one"),
    ("negative damping later", lambda: setattr(module(), "damp", -1), ValueError, "damp: expected a number >= 0, got -1"),
    ("damping is gnh", lambda: module(damp=True), TypeError, "damp: expected a number, got True of bool"),
    ("gnh is the solver", lambda: module(InfluenceModule, damp=1.0, gnh="cg"), TypeError, "gnh: expected True or False, got 'cg' of str"),
    ("rtol a text", lambda: module(rtol="1e-3").stest([0]), TypeError, "rtol, atol: expected numbers, got '1e-3' and 0.0"),
    ("rtol nan", lambda: module(rtol=NAN).stest([0]), ValueError, "rtol, atol: expected tolerances >= 0, got nan and 0.0"),
    ("no depth", lambda: module(LiSSAInfluenceModule, depth=None).stest([0]), ValueError, "depth: expected an integer >= 1, got None"),
    ("a batch as queries", lambda: module().explain([0]), TypeError, "queries: expected a number of them, got [0] of list"),
    ("singular by rounding", lambda: module(AutogradInfluenceModule, model=linear(), objective=objective(l2=0.0), damp=0.0, check_eigvals=True), ValueError, "the damped Hessian is singular, to the rounding of torch.float64"),
    ("unknown CG keyword", lambda: module(tolerance=1e-3), TypeError, "CGInfluenceModule got an unexpected keyword 'tolerance'; CG takes M, atol, callback, error_rtol, history, max_products, maxiter, rtol, tol, truncate, x0"),
    ("rtol twice", lambda: module(tol=1e-3), TypeError, "CGInfluenceModule got both rtol and tol, which is its older name; give one"),
    ("maxiter 0", lambda: module(maxiter=0).stest([0]), ValueError, "maxiter: expected at least 1, got 0"),
    ("negative rtol", lambda: module(rtol=-1.0).stest([0]), ValueError, "rtol, atol: expected tolerances >= 0, got -1.0 and 0.0"),
    ("x0 of wrong length", lambda: module(x0=np.ones(4)).stest([0]), ValueError, "x0: expected shape [43] or [1, 43], got [4]"),
    ("M of wrong shape", lambda: module(M=np.ones((4, 4))).stest([0]), ValueError, "M: expected shape [43, 43], got [4, 4]"),
    ("M a number", lambda: module(M=3.0).stest([0]), TypeError, "M: expected an array, sparse matrix, linear operator or callable, got float"),
    ("depth 0", lambda: module(LiSSAInfluenceModule, depth=0).stest([0]), ValueError, "depth: expected an integer >= 1, got 0"),
    ("repeat 1.5", lambda: module(LiSSAInfluenceModule, repeat=1.5).stest([0]), ValueError, "repeat: expected an integer >= 1, got 1.5"),
    ("scale 0", lambda: module(LiSSAInfluenceModule, scale=0.0).stest([0]), ValueError, 'scale: expected a number > 0 or "auto", got 0.0'),
    ("scale nan", lambda: module(LiSSAInfluenceModule, scale=NAN).stest([0]), ValueError, 'scale: expected a number > 0 or "auto", got nan'),
    ("negative eigenvalue", lambda: module(AutogradInfluenceModule, objective=Concave(), check_eigvals=True), ValueError, "the damped Hessian has a negative eigenvalue, -9."),
    ("singular", lambda: module(AutogradInfluenceModule, model=linear(), objective=Flat(), damp=0.0), torch.linalg.LinAlgError, "the curvature matrix is singular"),
]  # fmt: skip


def half_frozen() -> nn.Module:
    model = network()
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(("act", "kind", "words"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_error(act: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=re.escape(words)) as caught:
        act()
    assert type(caught.value) is kind


class SummedTrain(Classification):
    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1], reduction="sum")


class SummedTest(Classification):
    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize(
    ("objective", "name", "act"),
    [
        (SummedTrain(), "train_loss", lambda it: it.hvp(torch.ones(43))),
        (SummedTrain(), "train_loss", lambda it: it.train_loss_grad([0])),
        (SummedTrain(), "train_loss", lambda it: it.influences([0], None, torch.ones(43))),
        (SummedTest(), "test_loss", lambda it: it.test_loss_grad([0])),
        (SummedTest(), "test_loss", lambda it: it.stests([0])),
    ],
)
def test_summed_loss_is_noticed(objective: Classification, name: str, act: Callable[[Any], Any]) -> None:
    it = module(objective=objective)
    with pytest.warns(UserWarning, match=f"{name}: expected the mean loss over the batch, got what looks like the sum"):
        act(it)


WEIGHTS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)


class ClassWeights(Classification):
    """The loss of a batch is divided by the weights of its classes."""

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1], weight=WEIGHTS)


class ConstantDivisor(Classification):
    """As the warning has it."""

    def __init__(self, all_labels: Tensor) -> None:
        self.mean = WEIGHTS[all_labels].mean()

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return (F.cross_entropy(outputs, batch[1], weight=WEIGHTS, reduction="none") / self.mean).mean()


class SkipsAClass(Classification):
    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1], ignore_index=0).nan_to_num(0.0)


class WeightedTest(Classification):
    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], weight=WEIGHTS)


def by_class() -> DataLoader:
    """Sorted by class, so that neighbours weigh the same."""
    x, y = loader().dataset.tensors
    order = y.argsort()
    return DataLoader(TensorDataset(x[order], y[order]), batch_size=5)


@pytest.mark.parametrize(
    ("objective", "name"),
    [(ClassWeights(), "train_loss"), (SkipsAClass(), "train_loss"), (WeightedTest(), "test_loss")],
)
@pytest.mark.parametrize("data", [loader, by_class])
def test_a_loss_that_depends_on_the_rest_of_the_batch_is_noticed(objective: Any, name: str, data: Any) -> None:
    it = module(objective=objective, train_loader=data(), test_loader=data())
    with pytest.warns(
        UserWarning, match=f"{name}: expected the mean loss over the batch, got something else: "
    ) as caught:
        it.influences([0], [0])
    assert caught[0].filename == __file__
    checks = it.verify(print=False)
    assert [check.name for check in checks.checks if not check.passed][:1] == ["mean"]


def test_what_the_warning_advises_is_the_objective_of_the_whole_data(recwarn: pytest.WarningsRecorder) -> None:
    x, y = loader().dataset.tensors
    advised = module(objective=ConstantDivisor(y))
    whole = module(objective=ClassWeights(), train_loader=DataLoader(TensorDataset(x, y), batch_size=23))
    v = torch.randn(43, dtype=torch.float64)
    torch.testing.assert_close(advised.hvp(v), whole.hvp(v).clone())  # what was trained, in one batch
    recwarn.clear()
    module(objective=Classification()).influences([0], [0])
    module(objective=ConstantDivisor(y)).influences([0], [0])
    assert module(objective=ConstantDivisor(y)).verify(print=False).passed
    assert not recwarn.list


def test_examples_that_fit_no_common_batch_are_no_mistake(recwarn: pytest.WarningsRecorder) -> None:
    class Sequences(Classification):
        def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0]).mean(dim=1)

        def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
            return self.train_loss_on_outputs(self.train_outputs(model, batch), batch)

    lengths = [[1, 1, 2, 2], [1, 2, 3, 4]]  # neighbours fit; none do
    for some in lengths:
        data = [(torch.randn(length, 4, dtype=torch.float64), i % 3) for i, length in enumerate(some)]
        batches = [[0, 1], [2, 3]] if some == lengths[0] else [[0], [1], [2], [3]]
        ragged = DataLoader(data, batch_sampler=batches)  # type: ignore[arg-type]
        it = module(objective=Sequences(), train_loader=ragged, test_loader=ragged)
        assert it.influences([0, 3], [0]).isfinite().all()
    assert not recwarn.list


# -- samplers ----------------------------------------------------------------------------------------------------------

SELECTING = {
    "SubsetRandomSampler": lambda n: SubsetRandomSampler(range(n // 2)),
    "WeightedRandomSampler": lambda n: WeightedRandomSampler([1.0] * n, n),
    "list": lambda n: [0, 1],
}


@pytest.mark.parametrize("kind", SELECTING)
def test_a_sampler_that_selects_is_said_to_be_ignored(kind: str) -> None:
    dataset = loader().dataset
    selecting = DataLoader(dataset, batch_size=5, sampler=SELECTING[kind](23))
    with pytest.warns(UserWarning, match=f"train_loader: its {kind} is ignored, all 23 examples .*Subset") as caught:
        module(train_loader=selecting)
    assert caught[0].filename == module.__code__.co_filename  # where the constructor is called


def test_a_sampler_that_only_orders_is_not_spoken_of(recwarn: pytest.WarningsRecorder) -> None:
    dataset = loader().dataset
    for sampler in (None, RandomSampler(dataset), SequentialSampler(dataset), list(range(22, -1, -1))):
        module(train_loader=DataLoader(dataset, batch_size=5, sampler=sampler))
    module(train_loader=DataLoader(dataset, batch_size=5, sampler=DistributedSampler(dataset, 4, 1)))
    assert not recwarn.list


def test_indefinite_matrix_is_solved_with_a_warning_that_names_the_cure() -> None:
    with pytest.warns(NegativeCurvatureWarning, match="smallest eigenvalue -9.*damping larger by") as caught:
        it = module(AutogradInfluenceModule, objective=Concave())
    v = torch.randn(43, dtype=torch.float64)
    torch.testing.assert_close(it.hvp(it.inverse_hvp(v)) + it.inverse_hvp(v), v)
    cure = float(re.search(r"larger by ([0-9.e+-]+)", str(caught[0].message)).group(1))  # type: ignore[union-attr]
    module(AutogradInfluenceModule, objective=Concave(), damp=1.0 + cure, check_eigvals=True)


def test_parameters_that_are_nan_are_named() -> None:
    with pytest.warns(RuntimeWarning, match="model: 1 of 2 entries of scale are NaN, and so will be scores"):
        module(model=with_parameter(torch.tensor([1.0, NAN])))


def test_diverging_lissa_says_so() -> None:
    it = module(LiSSAInfluenceModule, scale=1e-3, depth=200, on_failure="warn")
    with pytest.warns(DivergenceWarning, match="LiSSA diverged for 1 of 1.*scale=0.001 is below half"):
        it.inverse_hvp(torch.randn(43, dtype=torch.float64))
    assert not it.last_report.converged.any()


def test_scores_that_are_not_finite_say_so() -> None:
    train = loader()
    train.dataset.tensors[0][4] = NAN
    it = module(train_loader=train)
    with pytest.warns(RuntimeWarning, match="1 of 23 training examples have scores that are not finite.*example 4"):
        scores = it.influences(range(23), None, torch.ones(43, dtype=torch.float64))
    assert scores.isnan().nonzero().flatten().tolist() == [4]


def test_users_own_mistake_in_the_objective_is_raised_as_it_is() -> None:
    class Broken(Classification):
        def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[7])

    it = module(CGInfluenceModule, objective=Broken())
    with pytest.raises(IndexError, match="list index out of range"):
        it.influences([0, 1], None, torch.ones(43, dtype=torch.float64))
    assert isinstance(it.train_loader.dataset, TensorDataset)
