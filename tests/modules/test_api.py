from __future__ import annotations

import inspect
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import assert_close
from problems import SOLVER_OPTIONS, Classification, loader, module, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torch_influence
from torch_influence import AutogradInfluenceModule, BaseInfluenceModule, CGInfluenceModule, LiSSAInfluenceModule

ALL_MODULES = list(SOLVER_OPTIONS)


def test_names_and_import_paths_of_the_old_package() -> None:
    from torch_influence import base, modules

    assert base.BaseInfluenceModule is torch_influence.BaseInfluenceModule
    assert base.BaseObjective is torch_influence.BaseObjective
    assert modules.LiSSAInfluenceModule is torch_influence.LiSSAInfluenceModule
    assert torch_influence.__version__.split(".")[0].isdigit()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (BaseInfluenceModule, ["model", "objective", "train_loader", "test_loader", "device"]),
        (
            AutogradInfluenceModule,
            ["model", "objective", "train_loader", "test_loader", "device", "damp", "check_eigvals"],
        ),
        (CGInfluenceModule, ["model", "objective", "train_loader", "test_loader", "device", "damp", "gnh"]),
        (
            LiSSAInfluenceModule,
            [
                "model",
                "objective",
                "train_loader",
                "test_loader",
                "device",
                "damp",
                "repeat",
                "depth",
                "scale",
                "gnh",
                "debug_callback",
            ],
        ),
    ],
)
def test_positional_arguments_of_the_old_package(kind: type, names: list[str]) -> None:
    parameters = list(inspect.signature(kind).parameters.values())
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == names


@pytest.mark.parametrize("kind", ALL_MODULES)
def test_attributes_of_the_old_package(kind: type) -> None:
    model = network()
    it = module(kind, model=model)
    assert it.model is model
    assert it.device == torch.device("cpu")
    assert it.damp == 1.0
    assert it.params_names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert it.params_shape == ((5, 4), (5,), (3, 5), (3,))
    if kind is CGInfluenceModule:
        assert it.cg_kwargs == {"rtol": 1e-12}


@pytest.mark.parametrize("kind", ALL_MODULES)
def test_influences_is_one_score_per_index_in_the_order_given(kind: type) -> None:
    it = module(kind)
    torch.manual_seed(0)
    scores = it.influences([4, 0, 9], [1, 2])
    torch.manual_seed(0)
    swapped = it.influences([9, 4, 0], [1, 2])
    assert scores.shape == (3,)
    assert scores.device.type == "cpu"
    # Where an example stands may change in which order BLAS sums the d products of its score, and nothing else.
    assert_close(scores[[2, 0, 1]], swapped, operations=sum(p.numel() for p in it.model.parameters()))


def test_influences_takes_an_stest_and_then_needs_no_queries() -> None:
    it = module()
    stest = it.stest([1, 2])
    assert torch.equal(it.influences(range(23), None, stest), it.influences(range(23), [1, 2], stest=stest))
    torch.testing.assert_close(it.influences(range(23), None, stest), it.influences(range(23), [1, 2]))


def test_no_training_index_gives_an_empty_result() -> None:
    it = module()
    assert it.influences([], [0]).shape == (0,)
    assert it.influence_matrix([], [0, 1]).shape == (0, 2)
    assert it.influence_matrix([0, 1], []).shape == (2, 0)
    assert it.self_influences([]).shape == (0,)
    assert it.stests([]).shape == (0, 43)


@pytest.mark.parametrize("kind", [AutogradInfluenceModule, CGInfluenceModule])
def test_matrix_and_self_influence_agree_with_single_queries(kind: type) -> None:
    it = module(kind, test_loader=loader())  # queries are the training examples
    matrix = it.influence_matrix()
    assert matrix.shape == (23, 23)
    columns = torch.stack([it.influences(range(23), [q]) for q in (0, 5, 22)], dim=1)
    torch.testing.assert_close(matrix[:, [0, 5, 22]], columns)
    torch.testing.assert_close(it.influence_matrix([3, 1], [5, 2]), matrix[[3, 1]][:, [5, 2]])
    torch.testing.assert_close(it.stests([5, 2]), torch.stack([it.stest([5]), it.stest([2])]))
    # (1/n) gᵢᵀA⁻¹gᵢ, each from the overridable parts
    gradients = torch.stack([it.train_loss_grad([i]) for i in range(23)])
    expected = (gradients * it.inverse_hvp(gradients)).sum(dim=1) / 23
    torch.testing.assert_close(it.self_influences(), expected)
    torch.testing.assert_close(it.self_influences([4, 2]), expected[[4, 2]])


@pytest.mark.parametrize("kind", ALL_MODULES)
def test_inverse_hvp_takes_a_vector_or_rows(kind: type) -> None:
    it = module(kind)
    rows = torch.randn(4, 43, dtype=torch.float64)
    torch.manual_seed(0)
    together = it.inverse_hvp(rows)
    torch.manual_seed(0)
    alone = it.inverse_hvp(rows[1])
    assert together.shape == (4, 43)
    torch.testing.assert_close(together[1], alone)
    assert it.inverse_hvp(rows[:0]).shape == (0, 43)


def test_every_index_type_is_taken() -> None:
    it = module()
    expected = it.influences([3, 5], [0])
    for idxs in (np.array([3, 5]), torch.tensor([3, 5]), (3, 5), range(3, 6, 2), [np.int64(3), torch.tensor(5)]):
        assert torch.equal(it.influences(idxs, [0]), expected)


# -- subclasses of the user's ------------------------------------------------------------------------------------------


class OneVectorAtATime(BaseInfluenceModule):
    def inverse_hvp(self, vec: Tensor) -> Tensor:
        assert vec.dim() == 1
        return 2 * vec


class ManyVectors(BaseInfluenceModule):
    batched: ClassVar[bool] = True

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        return 2 * vec


@pytest.mark.parametrize("kind", [OneVectorAtATime, ManyVectors])
def test_subclass_that_implements_only_inverse_hvp(kind: type) -> None:
    it = module(kind)
    gradients = torch.stack([it.train_loss_grad([i]) for i in range(23)])
    queries = torch.stack([it.test_loss_grad([q]) for q in range(7)])
    torch.testing.assert_close(it.influence_matrix(), 2 / 23 * gradients @ queries.T)
    torch.testing.assert_close(it.self_influences(), 2 / 23 * gradients.square().sum(dim=1))
    torch.testing.assert_close(it.influences([2, 1], [3]), (2 / 23 * gradients @ queries.T)[[2, 1], 3])


def test_scores_go_through_an_overridden_test_loss_grad() -> None:
    class Doubled(ManyVectors):
        def test_loss_grad(self, test_idxs: Any) -> Tensor:
            return 2 * super().test_loss_grad(test_idxs)

    plain, doubled = module(ManyVectors), module(Doubled)
    torch.testing.assert_close(doubled.influence_matrix(), 2 * plain.influence_matrix())
    torch.testing.assert_close(doubled.influences([0, 1], [2, 3]), 2 * plain.influences([0, 1], [2, 3]))


def test_scores_go_through_an_overridden_stest() -> None:
    class Ones(ManyVectors):
        def stest(self, test_idxs: Any) -> Tensor:
            return torch.ones(43, dtype=torch.float64)

    it = module(Ones)
    expected = torch.stack([it.train_loss_grad([i]).sum() for i in range(23)]) / 23
    torch.testing.assert_close(it.influences(range(23), [0]), expected)
    torch.testing.assert_close(it.influence_matrix(test_idxs=[0, 4]), expected[:, None].expand(23, 2))


def test_hvp_batches_and_flat_parameters_build_a_solver() -> None:
    class Newton(BaseInfluenceModule):
        def inverse_hvp(self, vec: Tensor) -> Tensor:
            d = len(self.flat_parameters())
            return torch.linalg.solve(self.hvp(torch.eye(d, dtype=vec.dtype)) + torch.eye(d, dtype=vec.dtype), vec)

    torch.testing.assert_close(module(Newton).influence_matrix(), module(AutogradInfluenceModule).influence_matrix())
    it = module(Newton)
    assert [size for _, size in it.batches()] == [5, 5, 5, 5, 3]
    assert [size for _, size in it.batches(train=False)] == [3, 3, 1]
    assert [size for _, size in it.batches(batch_size=2, idxs=[3, 1, 7])] == [2, 1]
    assert [size for _, size in it.batches(sample=4)] == [5, 5, 5, 5]
    (batch, _), *_ = it.batches(batch_size=2, idxs=[3, 1, 7])
    assert torch.equal(batch[0], it.train_loader.dataset[[3, 1]][0])
    torch.testing.assert_close(it.flat_parameters(), nn.utils.parameters_to_vector(it.model.parameters()).detach())


class OldStyle(BaseInfluenceModule):
    """Written against the private helpers of torch-influence 0.1.0, in the manner of its own direct module."""

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        params = self._model_make_functional()
        flat_params = self._flatten_params_like(params)
        hess = torch.zeros((), dtype=vec.dtype)
        for batch, size in self._loader_wrapper(train=True):

            def f(theta: Tensor, batch: Any = batch) -> Tensor:
                self._model_reinsert_params(self._reshape_like_params(theta))
                return self.objective.train_loss(self.model, theta, batch)

            hess = hess + torch.autograd.functional.hessian(f, flat_params) * size
        with torch.no_grad():
            self._model_reinsert_params(self._reshape_like_params(flat_params), register=True)
        hess = hess / len(self.train_loader.dataset)
        return torch.linalg.solve(hess + torch.eye(len(vec), dtype=vec.dtype), vec)


class OldStyleProducts(BaseInfluenceModule):
    """The same with _hvp_at_batch, in the manner of the old CG module."""

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        flat_params = self._flatten_params_like(self._model_params(with_names=False))
        columns = []
        for unit in torch.eye(len(vec), dtype=vec.dtype):
            batches = self._loader_wrapper(train=True)
            terms = [self._hvp_at_batch(batch, flat_params, vec=unit, gnh=False) * size for batch, size in batches]
            columns.append(sum(terms) / len(self.train_loader.dataset) + unit)
        return torch.linalg.solve(torch.stack(columns), vec)


@pytest.mark.parametrize("kind", [OldStyle, OldStyleProducts])
def test_subclass_written_against_the_old_private_helpers(kind: type) -> None:
    model = network()
    before = list(model.parameters())
    it = module(kind, model=model)
    torch.testing.assert_close(
        it.influences(range(23), [1]), module(AutogradInfluenceModule).influences(range(23), [1])
    )
    assert it.model is model
    assert all(p is q for p, q in zip(before, model.parameters(), strict=True))
    assert not it.is_model_functional


def test_old_helpers_leave_the_model_alone_when_interrupted() -> None:
    model = network()
    before = list(model.parameters())
    it = module(OldStyle, model=model)
    params = it._model_make_functional()
    it._model_reinsert_params(tuple(torch.zeros_like(p) for p in params))  # and never put back
    assert it.model is not model
    assert all(p is q for p, q in zip(before, model.parameters(), strict=True))
    assert not any((p == 0).all() for p in model.parameters())
    assert it.influences([0], [0]).isfinite().all()


def test_overridden_transfer_to_device_sees_every_batch() -> None:
    class Wrapped(CGInfluenceModule):
        def _transfer_to_device(self, batch: Any) -> Any:
            x, y = super()._transfer_to_device(batch)
            return x * 0.5, y

    x, y = loader().dataset.tensors
    halved = DataLoader(TensorDataset(x * 0.5, y), batch_size=5)
    xt, yt = loader(n=7, batch_size=3, seed=3).dataset.tensors
    halved_test = DataLoader(TensorDataset(xt * 0.5, yt), batch_size=3)
    wrapped = module(Wrapped, rtol=1e-12, damp=1.0)
    torch.testing.assert_close(
        wrapped.influence_matrix(), module(train_loader=halved, test_loader=halved_test).influence_matrix()
    )


def test_overridden_train_loss_is_used_for_hessian_and_scores() -> None:
    class Scaled(Classification):
        def train_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
            return 3 * super().train_loss(model, params, batch)

    plain, scaled = module(), module(objective=Scaled())
    v = torch.randn(43, dtype=torch.float64)
    torch.testing.assert_close(scaled.hvp(v), 3 * plain.hvp(v))
    stest = plain.stest([0])
    torch.testing.assert_close(scaled.influences([1, 2], None, stest), 3 * plain.influences([1, 2], None, stest))
    for kind in (CGInfluenceModule, LiSSAInfluenceModule):
        with pytest.warns(UserWarning, match="train_loss is overridden.*gnh=True"):
            module(kind, objective=Scaled(), gnh=True)


def test_old_objectives_may_name_the_arguments_of_test_loss_in_any_order() -> None:
    class Reordered(Classification):
        def test_loss(self, batch: Any, *, params: Tensor, model: nn.Module) -> Tensor:  # type: ignore[override]
            return super().test_loss(model, params, batch)

    class Renamed(Classification):
        def test_loss(self, net: nn.Module, theta: Tensor, data: Any) -> Tensor:  # type: ignore[override]
            return super().test_loss(net, theta, data)

    expected = module().influence_matrix()
    for objective in (Reordered(), Renamed()):
        assert torch.equal(module(objective=objective).influence_matrix(), expected)


def test_every_kind_of_example_is_compared_with_the_plain_way() -> None:
    class OddOnes(Classification):
        """Right alone and under vmap, but for examples with the constant 1, which differ under vmap."""

        def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
            loss = F.cross_entropy(outputs, batch[1])
            mapped = torch._C._functorch.maybe_current_level() is not None
            return loss * (3 if mapped and batch[2] == 1 else 1)

    def collate(items: list[Any]) -> Any:
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]), int(items[0][0][0] > 0)

    data = DataLoader(loader().dataset, batch_size=5, collate_fn=collate)
    stest = torch.ones(43, dtype=torch.float64)
    odd = module(objective=OddOnes(), train_loader=data).influences(range(23), None, stest)
    torch.testing.assert_close(odd, module().influences(range(23), None, stest))


# -- parameters --------------------------------------------------------------------------------------------------------


def pick(names: list[str]) -> Any:
    return lambda name, p: name in names


@pytest.mark.parametrize(
    "select",
    [
        "2.*",
        ["2.weight", "2.bias"],
        ["2.bias", "2.w*"],
        lambda model: [model[2].weight, model[2].bias],
        lambda model: pick(["2.weight", "2.bias"]),
    ],
    ids=["glob", "names", "unordered", "Parameters", "predicate"],
)
def test_params_restricts_to_a_block_of_the_hessian(select: Any) -> None:
    model = network()
    choice = select(model) if callable(select) else select
    part = module(AutogradInfluenceModule, model=model, params=choice)
    whole = module(AutogradInfluenceModule)
    assert part.params_names == ("2.weight", "2.bias")
    torch.testing.assert_close(part.hess, whole.hess[25:, 25:])
    torch.testing.assert_close(part.train_loss_grad([0, 3]), whole.train_loss_grad([0, 3])[25:])
    assert all(p.requires_grad for p in model.parameters())


def test_regulariser_sees_all_trainable_parameters_when_some_are_selected() -> None:
    seen = []

    class Watching(Classification):
        def train_regularization(self, params: Tensor) -> Tensor:
            seen.append(params.numel())
            return params.square().sum() ** 2  # couples the selected with the others

    part = module(AutogradInfluenceModule, objective=Watching(), params="2.*")
    whole = module(AutogradInfluenceModule, objective=Watching())
    torch.testing.assert_close(part.hess, whole.hess[25:, 25:])
    assert set(seen) == {43}


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    it = module(AutogradInfluenceModule, model=model)
    assert it.params_names == ("2.weight", "2.bias")
    assert it.hess.shape == (18, 18)


def test_tied_weights_can_be_selected_by_either_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, dtype=torch.float64)
            self.second = nn.Linear(4, 4, dtype=torch.float64)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    by_first, by_second = (module(model=Tied(), params=name).params_names for name in ("first.weight", "second.weight"))
    assert by_first == by_second == ("first.weight",)


# -- solvers' own arguments --------------------------------------------------------------------------------------------


def test_cg_takes_the_older_name_of_rtol() -> None:
    v = torch.randn(43, dtype=torch.float64)
    old_name = module()
    old_name.cg_kwargs = {"tol": 1e-3}
    new_name = module(rtol=1e-3)
    assert torch.equal(old_name.inverse_hvp(v), new_name.inverse_hvp(v))
    assert int(new_name.last_report.iterations) < int(module_report(module(), v).iterations)


def test_cg_options_are_attributes_too() -> None:
    v = torch.randn(43, dtype=torch.float64)
    changed, asked = module(), module(rtol=1e-3, maxiter=3)
    changed.cg_kwargs = {"tol": 1e-12}
    assert (changed.rtol, changed.atol, changed.maxiter, changed.M) == (1e-12, 0.0, None, None)
    changed.rtol, changed.maxiter = 1e-3, 3
    assert changed.cg_kwargs == {"rtol": 1e-3, "maxiter": 3}
    assert torch.equal(changed.inverse_hvp(v), asked.inverse_hvp(v))


def module_report(it: Any, v: Tensor) -> Any:
    it.inverse_hvp(v)
    return it.last_report


def test_cg_callback_gets_an_array_per_iteration() -> None:
    iterates: list[np.ndarray] = []
    it = module(callback=iterates.append)
    x = it.inverse_hvp(torch.randn(43, dtype=torch.float64))
    assert len(iterates) == int(it.last_report.iterations)
    assert all(isinstance(xk, np.ndarray) and xk.shape == (43,) for xk in iterates)
    assert np.array_equal(iterates[-1], x.numpy())
    assert not np.array_equal(iterates[0], iterates[-1])


def test_lissa_callback_gets_run_step_and_a_vector_it_may_keep() -> None:
    seen: list[tuple[int, int, Tensor]] = []
    it = module(LiSSAInfluenceModule, repeat=2, depth=3, debug_callback=lambda r, t, h: seen.append((r, t, h)))
    x = it.inverse_hvp(torch.randn(43, dtype=torch.float64))
    assert [(r, t) for r, t, _ in seen] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert all(h.shape == (43,) for _, _, h in seen)
    torch.testing.assert_close(x, (seen[2][2] + seen[5][2]) / 2 / 20.0)


def test_lissa_with_a_generator_leaves_the_default_one_alone() -> None:
    v = torch.randn(43, dtype=torch.float64)
    state = torch.get_rng_state()
    results = [
        module(LiSSAInfluenceModule, generator=torch.Generator().manual_seed(seed)).inverse_hvp(v) for seed in (7, 7, 8)
    ]
    torch.set_rng_state(state)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_direct_module_keeps_its_matrix_and_says_when_it_is_stale() -> None:
    model = network()
    it = module(AutogradInfluenceModule, model=model, check_eigvals=True)
    v = torch.randn(43, dtype=torch.float64)
    before = it.inverse_hvp(v)
    torch.testing.assert_close(it.inverse_hess @ v, before)
    with torch.no_grad():
        model[0].bias.data[0] += 0.5  # bumps no version
    with pytest.warns(UserWarning, match="have changed since it was built"):
        assert torch.equal(it.inverse_hvp(v), before)


def test_direct_module_follows_damp() -> None:
    it, v = module(AutogradInfluenceModule), torch.randn(43, dtype=torch.float64)
    it.damp = 3.0
    torch.testing.assert_close(it.inverse_hvp(v), module(AutogradInfluenceModule, damp=3.0).inverse_hvp(v))
    torch.testing.assert_close(it.inverse_hess @ v, it.inverse_hvp(v))


@pytest.mark.parametrize("kind", ALL_MODULES)
def test_float64_from_end_to_end(kind: type) -> None:
    it = module(kind)
    assert it.train_loss_grad([0]).dtype == torch.float64
    assert it.hvp(torch.randn(43, dtype=torch.float64)).dtype == torch.float64
    assert it.influences([0], [0]).dtype == torch.float64
    assert it.self_influences([0]).dtype == torch.float64


@pytest.mark.parametrize("kind", ALL_MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_float32_vectors(kind: type, dtype: torch.dtype) -> None:
    options = {"rtol": 1e-2} if kind is CGInfluenceModule else {}
    train, test = loader(), loader(n=7, batch_size=3, seed=3)
    x, y = train.dataset.tensors
    xt, yt = test.dataset.tensors

    def scores_in(passes: torch.dtype) -> Tensor:
        """With model and data as the half precision stores them, passes in another."""
        model = network(dtype).to(passes)
        it = module(
            kind,
            model=model,
            train_loader=DataLoader(TensorDataset(x.to(dtype).to(passes), y), batch_size=5),
            test_loader=DataLoader(TensorDataset(xt.to(dtype).to(passes), yt), batch_size=3),
            **options,
        )
        assert it.stest([0]).dtype == (torch.float32 if passes == dtype else torch.float64)
        torch.manual_seed(0)
        return it.influence_matrix()

    scores, reference = scores_in(dtype), scores_in(torch.float64)
    assert scores.dtype == torch.float32
    error = (scores - reference).norm() / reference.norm()
    assert error < 32 * torch.finfo(dtype).eps  # a few tens of roundings of the passes' dtype


@pytest.mark.parametrize("kind", ALL_MODULES)
def test_progress_changes_no_number(kind: type) -> None:
    results = []
    for progress in (False, True):
        torch.manual_seed(0)
        results.append(module(kind, progress=progress).influence_matrix())
    assert torch.equal(*results)


def test_report_prints_what_happened() -> None:
    it = module()
    it.influence_matrix(test_idxs=[0, 1, 2])
    assert "3 of 3 converged" in str(it.last_report)
    assert it.last_report.residual.shape == (3,)
    assert (it.last_report.residual <= 1e-12).all()


def test_module_works_without_a_test_loader() -> None:
    it = module(test_loader=None)
    assert it.influences([0], None, torch.ones(43)).shape == (1,)


def test_objective_that_reaches_into_the_model_sees_the_parameters_that_are_differentiated() -> None:
    class ReachingIn(Classification):
        def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return F.linear(torch.tanh(model[0](batch[0])), model[2].weight, model[2].bias)

        def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch[1])

        def train_regularization(self, params: Tensor) -> Tensor:
            assert params.numel() == 43
            return 0.5 * self.l2 * params.square().sum()

    direct, reaching = module(AutogradInfluenceModule), module(AutogradInfluenceModule, objective=ReachingIn())
    torch.testing.assert_close(reaching.hess, direct.hess)
    torch.testing.assert_close(reaching.influence_matrix(), direct.influence_matrix())


@pytest.mark.parametrize("gnh", [False, True])
@pytest.mark.parametrize("kind", [CGInfluenceModule, LiSSAInfluenceModule])
@pytest.mark.parametrize("value", [0.0, 3, torch.tensor(2.0)], ids=["float", "int", "constant tensor"])
def test_regulariser_may_be_a_number_or_a_constant(kind: type, gnh: bool, value: Any) -> None:
    class Constant(Classification):
        def train_regularization(self, params: Tensor) -> Tensor | float:
            return value

    class Zero(Classification):
        l2 = 0.0

    torch.manual_seed(0)
    constant = module(kind, objective=Constant(), gnh=gnh).influence_matrix()
    torch.manual_seed(0)
    torch.testing.assert_close(constant, module(kind, objective=Zero(), gnh=gnh).influence_matrix())


def test_a_subclass_may_set_what_belongs_to_the_problem_in_its_body_or_early() -> None:
    class Solves(BaseInfluenceModule):
        damp, gnh = 0.3, True

        def inverse_hvp(self, vec: Tensor) -> Tensor:
            return vec

    class Later(Solves):
        damp = 0.7

        def __init__(self, **given: Any) -> None:
            self.gnh = False
            super().__init__(**given)

    for kind, damp, gnh in ((Solves, 0.3, True), (Later, 0.7, False)):
        it = module(kind)
        v = torch.linspace(-1, 1, 43, dtype=torch.float64)
        assert (it.damp, it.gnh, it.spectrum(1).damp) == (damp, gnh, damp)
        assert torch.equal(it.hvp(v), module(CGInfluenceModule, damp=1.0, gnh=gnh).hvp(v))
        it.damp = 0.1
        assert it.spectrum(1).damp == 0.1
