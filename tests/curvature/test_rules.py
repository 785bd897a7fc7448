"""Rules of operators: J v and Jᵀ u against the Jacobian by reverse mode, for every operator that has a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import Supervised, assert_close, dense_gauss_newton, loader_batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import CGInfluenceModule
from torch_influence.curvature import GaussNewton
from torch_influence.curvature._linear_map import LinearMap
from torch_influence.curvature._rules import Site, Weighted
from torch_influence.curvature._rules_of_layers import RULES
from torch_influence.gradients import nodes_behind
from torch_influence.plan import NotPossible

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:.* over the batch, got something else"),  # of a net with two ways through it
    pytest.mark.filterwarnings("ignore:params. unused.weight, unused.bias get no gradient from any"),
]

OPERATIONS = 2000.0  # more than additions and multiplications for any number here
Function = Callable[..., Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return numbers(*shape).abs() + 0.5


def unary(function: Callable[[Tensor], Tensor], of: Tensor | None = None) -> tuple[Function, list[Tensor]]:
    return function, [numbers(3, 4) if of is None else of]


X, IMAGES, MASK = numbers(3, 4), numbers(2, 4, 5, 5), numbers(3, 4) > 0
INDEX = torch.tensor([2, 0, 2])

# For each rule, functions of one tensor or several, whose graphs have the operator in them; and where they are taken.
CASES: dict[str, list[tuple[Function, list[Tensor]]]] = {
    "AbsBackward0": [unary(torch.abs)],
    "AdaptiveAvgPool2DBackward0": [unary(lambda x: F.adaptive_avg_pool2d(x, (2, 3)), IMAGES)],
    "AdaptiveMaxPool2DBackward0": [unary(lambda x: F.adaptive_max_pool2d(x, 2), IMAGES)],
    "AddBackward0": [
        (lambda x, y: torch.add(x, y, alpha=2), [X, numbers(4, seed=1)]),
        (lambda x: x.exp() + x + x.mT.mT, [X]),
        (lambda x: torch.zeros(2, 3, 4, dtype=x.dtype) + x, [X]),
    ],
    "AddBackward1": [unary(lambda x: torch.ops.aten.add.Scalar(x, 1.5))],
    "AddcmulBackward0": [(lambda x, y, z: torch.addcmul(x, y, z, value=3), [numbers(3, 4, seed=i) for i in range(3)])],
    "AddmmBackward0": [
        (F.linear, [numbers(4, 3), numbers(5, 3, seed=1), numbers(5, seed=2)]),
        (lambda w, b: F.linear(numbers(2, 4, 3), w, b), [numbers(5, 3), numbers(5)]),
        (lambda b: F.linear(numbers(4, 3), numbers(5, 3), b), [numbers(5)]),
        (
            lambda b, x, w: torch.addmm(b, x, w, beta=2, alpha=3),
            [numbers(4, 1), numbers(4, 3, seed=1), numbers(3, 5, seed=2)],
        ),
        (lambda b, x: torch.addmm(b, x, numbers(3, 5), beta=2, alpha=3), [numbers(1, 5), numbers(4, 3, seed=1)]),
        (lambda b, w: torch.addmm(b, numbers(4, 3), w), [numbers(4, 5), numbers(3, 5, seed=2)]),
    ],
    "AliasBackward0": [unary(lambda x: torch.ops.aten.alias(x) * 2)],
    "AsStridedBackward1": [
        unary(lambda x: F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1), IMAGES)
    ],
    "AvgPool2DBackward0": [
        unary(lambda x: F.avg_pool2d(x, 2, padding=1, count_include_pad=False), IMAGES),
        unary(lambda x: F.avg_pool2d(x.contiguous(memory_format=torch.channels_last), 2), IMAGES),
        unary(lambda x: F.avg_pool1d(x, 2), IMAGES[0, 0]),
    ],
    "AvgPool3DBackward0": [unary(lambda x: F.avg_pool3d(x, 2, stride=1), numbers(2, 2, 3, 3, 3))],
    "BmmBackward0": [(torch.bmm, [numbers(2, 3, 4), numbers(2, 4, 5, seed=1)])],
    "CatBackward0": [
        (lambda x, y: torch.cat([x, y, x], 1), [X, numbers(3, 2)]),
        (lambda x, y: torch.cat([X, x, X, y], 0), [X, numbers(2, 4)]),
    ],
    "CeluBackward0": [unary(F.celu)],
    "ClampBackward1": [unary(lambda x: x.clamp(-0.5, 0.5))],
    "ClampMaxBackward0": [unary(lambda x: x.clamp_max(0.5))],
    "ClampMinBackward0": [unary(lambda x: x.clamp_min(0.5))],
    "CloneBackward0": [unary(lambda x: x.mT.contiguous() * x.mT)],
    "ConstantPadNdBackward0": [unary(lambda x: F.pad(x, (1, 2, -1, 0)), IMAGES)],
    "ConvolutionBackward0": [
        (F.conv2d, [IMAGES, numbers(3, 4, 2, 2, seed=1), numbers(3, seed=2)]),
        (
            lambda x, w: F.conv2d(x, w.contiguous(memory_format=torch.channels_last), padding=1),
            [IMAGES, numbers(3, 4, 3, 3, seed=1)],
        ),
        (
            lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=(1, 0), dilation=2, groups=2),
            [IMAGES, numbers(6, 2, 2, 2, seed=1), numbers(6, seed=2)],
        ),
        (lambda w, b: F.conv1d(IMAGES[0], w, b), [numbers(3, 5, 2), numbers(3)]),
        (F.conv3d, [numbers(2, 2, 3, 3, 3), numbers(3, 2, 2, 2, 2, seed=1)]),
        (
            lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, groups=2, output_padding=1),
            [IMAGES, numbers(4, 3, 2, 2, seed=1), numbers(6, seed=2)],
        ),
        (lambda b: F.conv2d(IMAGES, numbers(3, 4, 2, 2), b), [numbers(3)]),
    ],
    "CosBackward0": [unary(torch.cos)],
    "DivBackward0": [(torch.div, [X, positive(4)]), unary(lambda x: x / 3), (lambda y: X / y, [positive(3, 1)])],
    "DivBackward1": [unary(lambda x: torch.ops.aten.div.Scalar(x, 2.5))],
    "EluBackward0": [unary(F.elu), unary(F.selu)],
    "EmbeddingBackward0": [
        (lambda w: F.embedding(torch.tensor([[0, 3], [3, 1]]), w), [X.mT.contiguous()]),
        (lambda w: F.embedding(torch.tensor([0, 3, 3]), w, padding_idx=3), [X.mT.contiguous()]),
    ],
    "ErfBackward0": [unary(torch.erf)],
    "ExpBackward0": [unary(torch.exp)],
    "ExpandBackward0": [unary(lambda x: x.expand(2, 3, 4) * 2), unary(lambda x: x.expand(3, 4), numbers(3, 1))],
    "Expm1Backward0": [unary(torch.expm1)],
    "GatherBackward0": [unary(lambda x: x.gather(1, torch.tensor([[0, 0], [3, 1], [2, 2]])))],
    "GeluBackward0": [unary(F.gelu), unary(lambda x: F.gelu(x, approximate="tanh"))],
    "HardshrinkBackward0": [unary(F.hardshrink)],
    "HardsigmoidBackward0": [unary(F.hardsigmoid)],
    "HardswishBackward0": [unary(F.hardswish)],
    "HardtanhBackward0": [unary(F.hardtanh), unary(F.relu6)],
    "IndexBackward0": [unary(lambda x: x[INDEX]), unary(lambda x: x[:, INDEX]), unary(lambda x: x[MASK])],
    "IndexSelectBackward0": [unary(lambda x: x.index_select(1, INDEX))],
    "LeakyReluBackward0": [unary(F.leaky_relu)],
    "LerpBackward0": [(lambda x, y: torch.lerp(x, y, 0.3), [X, numbers(3, 4, seed=1)])],
    "Log1PBackward0": [unary(torch.log1p, positive(3, 4))],
    "LogBackward0": [unary(torch.log, positive(3, 4))],
    "LogSigmoidBackward0": [unary(F.logsigmoid)],
    "LogSoftmaxBackward0": [unary(lambda x: F.log_softmax(x, 0)), unary(lambda x: F.log_softmax(x, -1))],
    "LogsumexpBackward0": [unary(lambda x: x.logsumexp(1)), unary(lambda x: x.logsumexp((0, 1), keepdim=True))],
    "MaskedFillBackward0": [unary(lambda x: x.masked_fill(MASK, 2.0))],
    "MaxPool2DWithIndicesBackward0": [
        unary(lambda x: F.max_pool2d(x, 3, stride=1), IMAGES),
        unary(lambda x: F.max_pool1d(x, 2), IMAGES[0]),
    ],
    "MaximumBackward0": [(torch.maximum, [X, numbers(3, 4, seed=1)])],
    "MeanBackward0": [unary(torch.mean)],
    "MeanBackward1": [unary(lambda x: x.mean((-1, 1)), IMAGES), unary(lambda x: x.mean(0, keepdim=True))],
    "MinimumBackward0": [(torch.minimum, [X, numbers(3, 4, seed=1)])],
    "MishBackward0": [unary(F.mish)],
    "MmBackward0": [
        (torch.mm, [X, numbers(4, 5, seed=1)]),
        (lambda w: F.linear(numbers(2, 3, 4), w), [numbers(5, 4)]),
        (lambda x: x @ numbers(4, 5), [X]),
    ],
    "MulBackward0": [
        (torch.mul, [X, numbers(3, 1, seed=1)]),
        (lambda x: x * x, [X]),
        unary(lambda x: 3 * x),
        unary(lambda x: x.sum() * X),
    ],
    "MulBackward1": [unary(lambda x: torch.ops.aten.mul.Scalar(x, 2.5))],
    "NativeBatchNormBackward0": [
        (
            lambda x, w, b: F.batch_norm(x, numbers(4), positive(4), w, b),
            [IMAGES, numbers(4, seed=1), numbers(4, seed=2)],
        ),
        (lambda x: F.batch_norm(x, numbers(4), positive(4)), [X]),
        (lambda w, b: F.batch_norm(X, numbers(4), positive(4), w, b), [numbers(4), numbers(4, seed=2)]),
    ],
    "NativeGroupNormBackward0": [
        (lambda x, w, b: F.group_norm(x, 2, w, b), [IMAGES, numbers(4, seed=1), numbers(4, seed=2)]),
        (lambda x: F.group_norm(x, 2), [IMAGES]),
    ],
    "NativeLayerNormBackward0": [
        (lambda x, w, b: F.layer_norm(x, (4,), w, b), [X, numbers(4, seed=1), numbers(4, seed=2)]),
        (lambda x: F.layer_norm(x, (5, 5)), [IMAGES]),
        (lambda b: F.layer_norm(X, (4,), numbers(4), b), [numbers(4)]),
    ],
    "NegBackward0": [unary(torch.neg)],
    "PermuteBackward0": [unary(lambda x: x.permute(1, -1, 0, 2), IMAGES)],
    "PowBackward0": [unary(lambda x: x**3)],
    "PowBackward1": [(torch.pow, [positive(3, 4), X])],
    "ReciprocalBackward0": [unary(lambda x: 3 / x, positive(3, 4))],
    "ReluBackward0": [unary(F.relu), unary(lambda x: F.relu_(x * 2))],
    "RepeatBackward0": [unary(lambda x: x.repeat(2, 1, 3)), unary(lambda x: x.repeat(1, 1))],
    "ReshapeAliasBackward0": [unary(lambda x: torch.ops.aten._reshape_alias(x, [2, 6], [6, 1]))],
    "RsqrtBackward0": [unary(torch.rsqrt, positive(3, 4))],
    "RsubBackward1": [unary(lambda x: torch.rsub(x, 2.0, alpha=3))],
    "SafeSoftmaxBackward0": [unary(lambda x: torch.ops.aten._safe_softmax(x, -1))],
    "SelectBackward0": [unary(lambda x: x[:, -1]), unary(lambda x: x[1])],
    "SigmoidBackward0": [unary(torch.sigmoid)],
    "SiluBackward0": [unary(F.silu)],
    "SinBackward0": [unary(torch.sin)],
    "SliceBackward0": [unary(lambda x: x[1:, ::2]), unary(lambda x: x[:, -3:-1])],
    "SoftmaxBackward0": [unary(lambda x: F.softmax(x, 0)), unary(lambda x: F.softmax(x, -1))],
    "SoftplusBackward0": [unary(F.softplus)],
    "SoftshrinkBackward0": [unary(F.softshrink)],
    "SplitBackward0": [unary(lambda x: torch.cat([x.split(3, 1)[1], x.split(3, 1)[0] * 2], 1))],
    "SplitWithSizesBackward0": [unary(lambda x: x.split([1, 3], 1)[1])],
    "SqrtBackward0": [unary(torch.sqrt, positive(3, 4))],
    "SqueezeBackward0": [unary(lambda x: x.squeeze(), numbers(1, 3, 1))],
    "SqueezeBackward1": [unary(lambda x: x.squeeze(0), numbers(1, 3, 1))],
    "SqueezeBackward2": [unary(lambda x: x.squeeze((0, 2)), numbers(1, 3, 1))],
    "StackBackward0": [(lambda x, y: torch.stack([x, y, x], -1), [X, numbers(3, 4, seed=1)])],
    "SubBackward0": [(lambda x, y: torch.sub(x, y, alpha=2), [X, numbers(4, seed=1)])],
    "SubBackward1": [unary(lambda x: torch.ops.aten.sub.Scalar(x, 1.5))],
    "SumBackward0": [unary(torch.sum), unary(torch.sum, numbers())],
    "SumBackward1": [unary(lambda x: x.sum((-1, 1)), IMAGES), unary(lambda x: x.sum(0, keepdim=True))],
    "TBackward0": [unary(lambda x: x.t() * 2), unary(lambda x: x.t() * 2, numbers(3))],
    "TanhBackward0": [unary(torch.tanh)],
    "ThresholdBackward0": [unary(lambda x: F.threshold(x, 0.1, 0.0))],
    "TransposeBackward0": [unary(lambda x: x.transpose(-1, 1), IMAGES)],
    "TransposeBackward1": [unary(lambda x: (x * 2).transpose_(0, 1))],
    "UnbindBackward0": [unary(lambda x: x.unbind(1)[2] * x.unbind(1)[0])],
    "UnsafeSplitBackward0": [unary(lambda x: torch.unsafe_chunk(x, 2, 1)[1])],
    "UnsafeViewBackward0": [unary(lambda x: torch.ops.aten._unsafe_view(x, [2, 6]))],
    "UnsqueezeBackward0": [unary(lambda x: x.unsqueeze(-1))],
    "ViewBackward0": [unary(lambda x: x.view(2, 6))],
    "WhereBackward0": [(lambda x, y: torch.where(MASK, x, y), [X, numbers(4, seed=1)])],
}


def jacobian(outputs: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """One row per output, by reverse mode."""
    rows = [
        torch.autograd.grad(out, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for out in outputs.reshape(-1)
    ]
    return [torch.stack([row[i] for row in rows]) for i in range(len(leaves))]


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_the_jacobian(name: str) -> None:
    for function, at in CASES[name]:
        for chosen in [range(len(at)), *([i] for i in range(len(at)) if len(at) > 1)]:
            check(name, function, at, [*chosen])


def check(name: str, function: Function, at: list[Tensor], chosen: list[int]) -> None:
    leaves = [x.clone().requires_grad_(i in chosen) for i, x in enumerate(at)]
    # Each leaf has an operator before it, whose results may be overwritten, and one after, which asks for the same.
    outputs = function(*(x.sin() if i in chosen else x for i, x in enumerate(leaves)))
    outputs = outputs * 2
    leaves = [leaves[i] for i in chosen]
    if len(chosen) == len(at):
        assert name in {node.name() for node in nodes_behind([outputs])}
    expected = jacobian(outputs, leaves)
    found = LinearMap(outputs, leaves)

    identity = torch.eye(outputs.numel(), dtype=outputs.dtype).reshape(-1, *outputs.shape)
    for rows in (identity, identity[-1:]):
        for mine in (False, True):
            for actual, matrix in zip(found.pull(rows.clone(), mine), expected, strict=True):
                assert_close(actual, matrix[-len(rows) :], operations=OPERATIONS)
    for i, matrix in enumerate(expected):
        identity = torch.eye(leaves[i].numel(), dtype=outputs.dtype).reshape(-1, *leaves[i].shape)
        columns = matrix.reshape(outputs.numel(), -1).mT.reshape(-1, *outputs.shape)
        for rows in (identity, identity[-1:]):
            tangents = [x.new_zeros(len(rows), *x.shape) for x in leaves]
            tangents[i] = rows.clone()
            before = [t.clone() for t in tangents]
            actual = found.push(tangents)
            assert_close(actual, columns[-len(rows) :], operations=OPERATIONS)
            assert all(map(torch.equal, tangents, before))

    generator = torch.Generator().manual_seed(1)
    tangents = [torch.randn(3, *x.shape, generator=generator, dtype=x.dtype) for x in leaves]
    u = torch.randn(3, *outputs.shape, generator=generator, dtype=outputs.dtype)
    forward = (u * found.push(tangents)).reshape(3, -1).sum(1)
    back = sum((c * t).reshape(3, -1).sum(1) for c, t in zip(found.pull(u), tangents, strict=True))
    assert isinstance(back, Tensor)
    scale = sum(float(m.abs().sum()) for m in expected)
    assert_close(back, forward, operations=OPERATIONS, scale=scale)
    assert found.push([t[:0] for t in tangents]).shape == (0, *outputs.shape)
    assert [c.shape for c in found.pull(u[:0])] == [(0, *x.shape) for x in leaves]


# -- in a module ------------------------------------------------------------------------------------------------------

N, BATCH = 7, 3  # the last batch has 1


class Residual(nn.Module):
    """A layer used twice, a connection around it, an activation in place, a frozen layer, a tied one, one not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.tied, self.frozen, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.tied.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.norm.running_mean.fill_(0.3)
        self.norm.running_var.fill_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.first(x)) + x
        h = h + torch.tanh(self.again(h))
        h = self.norm(self.frozen(self.again(h))) * h.mean(1, keepdim=True)
        return self.last(self.tied(h).sigmoid())


class Cubed(torch.autograd.Function):
    """An operator of one's own, which no rule is known of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class WithCube(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Cubed.apply(self.first(x)))


class OtherWay(nn.Module):
    """Takes another way through the cube for the last example, a batch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(Cubed.apply(h) if len(x) == 1 else torch.tanh(h))


class Images(nn.Module):
    """A first layer of few parameters, whose outputs are many."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(torch.tanh(self.first(x)), 4)
        return self.last(h.flatten(1))


def made(model: Callable[[], nn.Module], *shape: int, params: Any = None) -> tuple[CGInfluenceModule, Tensor]:
    torch.manual_seed(0)
    net, objective = model().double().eval(), Supervised(F.cross_entropy, l2=0.1)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, *shape, generator=generator, dtype=torch.float64)
    loader = DataLoader(TensorDataset(inputs, torch.randint(3, (N,), generator=generator)), batch_size=BATCH)
    matrix = dense_gauss_newton(net, objective, loader_batches(loader))
    module = CGInfluenceModule(net, objective, loader, None, "cpu", 0.0, gnh=True, params=params)
    return module, matrix


def check_products(module: CGInfluenceModule, matrix: Tensor) -> GaussNewton:
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    for rows in (identity[:1], identity, identity[-1:], identity[:0]):
        assert_close(module.hvp(rows), rows @ matrix, operations=OPERATIONS, scale=float(matrix.abs().max()))
    curvature = module._problem._curvature[1]
    assert isinstance(curvature, GaussNewton)
    return curvature


def test_products_of_a_net_that_reuses_layers() -> None:
    curvature = check_products(*made(Residual, 4))
    assert curvature.by_rules
    assert not curvature.why_no_rules
    assert "by rules of its layers" in curvature.describe()


def test_products_of_some_parameters() -> None:
    module, matrix = made(Residual, 4, params=["again.*", "last.bias"])
    names = [n for n, p in module.model.named_parameters() if p.requires_grad for _ in range(p.numel())]
    chosen = torch.tensor([n.startswith("again") or n == "last.bias" for n in names])
    assert check_products(module, matrix[chosen][:, chosen]).by_rules


def test_an_operator_without_rule_is_differentiated_twice() -> None:
    module, matrix = made(WithCube, 4)
    curvature = check_products(module, matrix)
    assert not curvature.by_rules
    assert curvature.why_no_rules == "there is no rule for CubedBackward"
    assert "not rules of its layers: there is no rule for CubedBackward" in str(module.explain())


def test_a_rule_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(site: Site) -> Weighted:
        return Weighted(site, [3.0])

    monkeypatch.setitem(RULES, "CubedBackward", wrong)
    curvature = check_products(*made(WithCube, 4))
    assert curvature.why_no_rules == "a product by them differs from the plain one"


def test_a_rule_that_fails_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(site: Site) -> Weighted:
        return Weighted(site, [torch.ones(77)])

    monkeypatch.setitem(RULES, "CubedBackward", failing)
    curvature = check_products(*made(WithCube, 4))
    assert curvature.why_no_rules.startswith("a product by them failed")


def test_a_batch_of_another_structure_is_compared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    module, matrix = made(OtherWay, 4)
    with module._session():
        module._problem.curvature().why_not_grouped = "as the loader has them"
        module._problem.curvature()._prepared = True
    curvature = check_products(module, matrix)
    assert curvature.why_no_rules == "there is no rule for CubedBackward"

    monkeypatch.setitem(RULES, "CubedBackward", lambda site: Weighted(site, [3.0]))
    module, matrix = made(OtherWay, 4)
    with module._session():
        module._problem.curvature().why_not_grouped = "as the loader has them"
        module._problem.curvature()._prepared = True
    assert check_products(module, matrix).why_no_rules == "a product by them differs from the plain one"


def test_half_precision_is_differentiated_twice() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(NotPossible, match=r"the outputs are torch\.bfloat16"):
        LinearMap(x * 2, [x])
    y = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(NotPossible, match=r"a parameter is torch\.float32, and the outputs are torch\.float64"):
        LinearMap(y.double() * 2, [y])
    z = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotPossible, match="ToCopyBackward0"):
        LinearMap(z.float().double() * 2, [z])
    with pytest.raises(NotPossible, match="the outputs are parameters"):
        LinearMap(y, [y])


def test_an_edit_of_what_is_kept_is_an_error() -> None:
    x, w = numbers(3, 4), numbers(5, 4).requires_grad_()
    found = LinearMap(F.linear(x, w), [w])
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.push([w.detach()[None]])


def test_products_and_the_slopes_of_examples() -> None:
    module, matrix = made(Residual, 4)
    with module._session():
        curvature = module._problem.curvature()
        assert isinstance(curvature, GaussNewton)
        batch, size = next(iter(curvature.batches.read(None, N)))
        linearized = curvature.linearize(batch, curvature.leaves)
        assert linearized.product_and_slopes is not None
        rows = numbers(4, len(matrix))
        products, dots = linearized.product_and_slopes(curvature.evaluation.space.split(rows))
        plain = linearized.product(curvature.evaluation.space.split(rows))
    assert all(map(torch.equal, products, plain))
    loss = F.cross_entropy(module.model(batch[0]), batch[1], reduction="none")
    leaves = [p for p in module.model.parameters() if p.requires_grad]
    gradients = torch.cat([j.reshape(N, -1) for j in jacobian(loss, leaves)], dim=1)
    assert_close(dots, gradients @ rows.mT / size, operations=OPERATIONS, scale=float(gradients.abs().sum(1).max()))


def test_a_matrix_takes_the_place_of_a_first_layer() -> None:
    module, matrix = made(Images, 1, 16, 16)
    curvature = check_products(module, matrix)
    assert curvature.by_rules
    assert set(curvature._condensed.values()) == {True}


def test_the_matrix_is_taken_once_it_pays() -> None:
    module, _ = made(Images, 1, 16, 16)
    with module._session():
        curvature = module._problem.curvature()
        assert isinstance(curvature, GaussNewton)
        curvature.product(numbers(1, curvature.size))
        assert not curvature._condensed
        curvature.product(numbers(1, curvature.size))
        assert set(curvature._condensed.values()) == {True}


def test_the_map_with_a_matrix_is_the_same_and_keeps_less() -> None:
    torch.manual_seed(0)
    model = Images().double()
    leaves = list(model.parameters())
    images = numbers(5, 1, 16, 16)
    for sizes in ([0, 1, 2, 3], [0, 2], [1, 3]):
        some = [leaves[i] for i in sizes]
        for leaf in leaves:
            leaf.requires_grad_(any(leaf is x for x in some))
        outputs = model(images)
        expected = jacobian(outputs, some)
        found = LinearMap(outputs, some)
        dense = found.condensed((images, leaves))
        assert dense is not None
        assert sum(t.nbytes for t in dense.kept() if isinstance(t, Tensor)) < sum(
            t.nbytes for t in found.kept() if isinstance(t, Tensor)
        )
        u, tangents = numbers(2, 5, 3), [numbers(2, *x.shape) for x in some]
        for actual, row in zip(dense.pull(u), found.pull(u), strict=True):
            assert_close(actual, row, operations=OPERATIONS)
        jv = sum(torch.einsum("kp,op->ko", t.flatten(1), m.flatten(1)) for t, m in zip(tangents, expected, strict=True))
        assert isinstance(jv, Tensor)
        assert_close(dense.push(tangents), jv.view(2, 5, 3), operations=OPERATIONS)
        assert dense.condensed((images, leaves)) is None


def test_a_matrix_that_differs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LinearMap.condensed

    def other(self: LinearMap, besides: Any) -> LinearMap | None:
        found = plain(self, besides)
        if found is not None and found._dense is not None:
            found._dense[1].mul_(1.01)
        return found

    monkeypatch.setattr(LinearMap, "condensed", other)
    curvature = check_products(*made(Images, 1, 16, 16))
    assert set(curvature._condensed.values()) == {False}


def test_rules_keep_less_than_two_graphs() -> None:
    module, _ = made(Residual, 4)
    with module._session():
        curvature = module._problem.curvature()
        assert isinstance(curvature, GaussNewton)
        batch, _ = next(iter(curvature.batches.read(None, N)))
        by_rules = curvature.linearize(batch, curvature.leaves)
        curvature.why_no_rules = "not now"
        assert 0 < by_rules.nbytes < curvature.linearize(batch, curvature.leaves).nbytes
