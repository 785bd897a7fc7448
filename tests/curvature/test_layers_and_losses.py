"""Curvature and per-example gradients of many layers and losses, against dense float64 references."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import (
    IdentityModule,
    Loss,
    Supervised,
    assert_close,
    dense_gauss_newton,
    dense_hessian,
    example_gradients,
    loader_batches,
    mean_gradient,
    query_gradients,
    trainable,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import BaseInfluenceModule, CGInfluenceModule
from torch_influence.evaluation._composed import Composed
from torch_influence.gradients._examples import ExampleGradients

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:.* over the batch, got something else"),  # see test_errors.py
    pytest.mark.filterwarnings("ignore:the training loss has no curvature"),  # see test_doubts.py
    pytest.mark.filterwarnings("ignore:params. also_never, never.weight, never.bias get no gradient from any"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]

N, BATCH, MANY, FEW = 7, 3, 9, 2
SWEEPS = 4  # forward, backward, and the two of the second derivative
L2 = 0.02


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with a loss.

    Attributes:
        reference: builds the same model from other operators, with its parameters in the same order, where torch's
            own second derivative is missing or wrong.
        why_plain: part of the reason for which examples are taken one at a time; empty: they are not.
        inherent: relative error of torch's own derivatives.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    loss: Loss
    targets: Callable[[int], Tensor]
    reference: Callable[[], nn.Module] | None = None
    why_plain: str = ""
    inherent: float = 0.0
    l2: float = L2

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The same float32 numbers in either dtype."""
        torch.manual_seed(3)
        return self.build().to(dtype)

    def reference_model(self) -> nn.Module:
        model = self.model(torch.float64)
        if self.reference is None:
            return model
        twin = self.reference().double()
        for p, value in zip(trainable(twin), trainable(model), strict=True):
            p.data.copy_(value.data)
        return twin

    def loader(self, n: int, dtype: torch.dtype) -> DataLoader:
        torch.manual_seed(n)
        tensors = [self.inputs(n), self.targets(n)]
        return DataLoader(
            TensorDataset(*(t.to(dtype) if t.is_floating_point() else t for t in tensors)), batch_size=BATCH
        )

    @property
    def objective(self) -> Supervised:
        return Supervised(self.loss, self.l2)

    def module(self, kind: type[BaseInfluenceModule], dtype: torch.dtype, *args: object) -> BaseInfluenceModule:
        return kind(self.model(dtype), self.objective, self.loader(N, dtype), self.loader(MANY, dtype), "cpu", *args)


# -- layers -----------------------------------------------------------------------------------------------------------


class FunctionalAttention(nn.Module):
    """Two heads in four dimensions, the shape that torch has a fused kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).mean(2).flatten(1))


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        mixed, weights = self.attention(x, x, x, need_weights=self.need_weights)
        extra = 0.0 if weights is None else weights.square().sum((1, 2)).unsqueeze(-1)
        return self.head(mixed.mean(1)) + extra * torch.tensor([1.0, 0.0, -1.0], dtype=x.dtype)


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class TiedDecoder(nn.Module):
    """Predicts the next token with the embedding as its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 5)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.mix(self.embedding(tokens)).tanh()).mT


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.same_again = self.shared
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.same_again(self.shared(x).tanh()).tanh())


class Scaled(nn.Module):
    """Scalar parameters: a temperature and an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.linear = nn.Linear(4, 3)
        self.offset = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.offset).tanh() * self.temperature


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(2, 2)
        self.body = perceptron()
        self.also_never = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Pooled(nn.Module):
    """The mean over a sequence of what an inner module makes of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).mean(1))


def perceptron(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def convolution(groups: int = 1, norm: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, groups=groups), norm or nn.Identity(), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )


def channels_last() -> nn.Module:
    return convolution().to(memory_format=torch.channels_last)


def transposed_weight() -> nn.Module:
    model = perceptron()
    model[0].weight = nn.Parameter(torch.randn(4, 5).mT)
    return model


def frozen_first_layer() -> nn.Module:
    model = perceptron()
    model[0].requires_grad_(False)
    return model


def with_running_statistics(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), with_running_statistics(nn.BatchNorm1d(5)), nn.Tanh(), nn.Linear(5, 3))


class NormedByHand(nn.Module):
    """weight_norm by its definition, w = g v / |v| for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(5))
        self.g = nn.Parameter(torch.zeros(5, 1))
        self.v = nn.Parameter(torch.zeros(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.g * self.v / self.v.square().sum(1, keepdim=True).sqrt()).mT + self.bias


def normed(apply: Callable[[nn.Module], nn.Module], by_hand: bool = True) -> Case:
    def with_head(first: nn.Module) -> nn.Module:
        return nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3))

    reference = (lambda: with_head(NormedByHand())) if by_hand else None
    return layer(lambda: with_head(apply(nn.Linear(4, 5))), reference=reference)


def too_long_embeddings() -> nn.Module:
    return Pooled(nn.Embedding(5, 4, max_norm=1.0))


class ShortenedByHand(nn.Embedding):
    """max_norm without its effect on the weight; derivatives are those at the shortened rows."""

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight[tokens]
        norms = rows.detach().norm(dim=-1, keepdim=True)
        return rows - (rows - rows / (norms + 1e-7)).detach() * (norms > 1.0)


def vectors(n: int) -> Tensor:
    return torch.randn(n, 4)


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 5, 5)


def images_channels_last(n: int) -> Tensor:
    return images(n).to(memory_format=torch.channels_last)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 3, 4)


def tokens(n: int) -> Tensor:
    return torch.randint(5, (n, 3))


def classes(n: int) -> Tensor:
    return torch.randint(3, (n,))


def layer(build: Callable[[], nn.Module], inputs: Callable[[int], Tensor] = vectors, **options: Any) -> Case:
    return Case(build, inputs, F.cross_entropy, classes, **options)


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Case:
    return layer(lambda: Recurrent(kind(4, 2, batch_first=True, **options)), sequences, why_plain="failed")


def bag(mode: str, padding_idx: int | None = None) -> Case:
    """EmbeddingBag, by its definition: a reduction of the embeddings of the tokens that are not padding."""

    class Reduced(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            keep = (tokens != (-1 if padding_idx is None else padding_idx)).unsqueeze(-1)
            rows = self.weight[tokens]
            if mode == "max":
                return rows.masked_fill(~keep, -torch.inf).max(1).values
            total = (rows * keep).sum(1)
            return total if mode == "sum" else total / keep.sum(1)

    def with_head(first: nn.Module) -> nn.Module:
        return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3))

    return layer(
        lambda: with_head(nn.EmbeddingBag(5, 4, mode=mode, padding_idx=padding_idx)),
        tokens,
        reference=lambda: with_head(Reduced(5, 4)),
    )


LAYERS = {
    "linear": layer(perceptron),
    "conv2d": layer(convolution, images),
    "conv2d groups": layer(lambda: convolution(groups=2), images),
    "conv2d channels_last": layer(channels_last, images_channels_last),
    "non-contiguous weight": layer(transposed_weight),
    "batch norm 1d": layer(batch_norm),
    "batch norm 2d": layer(lambda: convolution(norm=with_running_statistics(nn.BatchNorm2d(4))), images),
    "dropout": layer(lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3))),
    "layer norm": layer(lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))),
    "group norm": layer(lambda: convolution(norm=nn.GroupNorm(2, 4)), images),
    "embedding with padding_idx": layer(lambda: Pooled(nn.Embedding(5, 4, padding_idx=0)), tokens),
    "embedding with sparse gradients": layer(
        lambda: Pooled(nn.Embedding(5, 4, sparse=True)), tokens, reference=lambda: Pooled(nn.Embedding(5, 4))
    ),
    "embedding with max_norm": layer(too_long_embeddings, tokens, reference=lambda: Pooled(ShortenedByHand(5, 4))),
    "embedding bag mean": bag("mean"),
    "embedding bag mean with padding_idx": bag("mean", padding_idx=0),
    "embedding bag sum with padding_idx": bag("sum", padding_idx=0),
    "embedding bag max": bag("max"),
    "lstm": recurrent(nn.LSTM),
    "lstm bidirectional": recurrent(nn.LSTM, bidirectional=True),
    "gru": recurrent(nn.GRU),
    "rnn": recurrent(nn.RNN),
    "scaled_dot_product_attention": layer(FunctionalAttention, sequences),
    "multihead attention": layer(lambda: SelfAttention(need_weights=False), sequences),
    "multihead attention with weights": layer(lambda: SelfAttention(need_weights=True), sequences),
    "transformer encoder layer": layer(
        lambda: Pooled(nn.TransformerEncoderLayer(4, 2, dim_feedforward=4, batch_first=True)), sequences
    ),
    "transformer encoder layer, norm first, gelu": layer(
        lambda: Pooled(
            nn.TransformerEncoderLayer(4, 2, dim_feedforward=4, batch_first=True, norm_first=True, activation="gelu")
        ),
        sequences,
    ),
    "weight_norm of torch.nn.utils": normed(nn.utils.weight_norm),
    "weight_norm as parametrization": normed(nn.utils.parametrizations.weight_norm),
    "spectral_norm as parametrization": normed(nn.utils.parametrizations.spectral_norm, by_hand=False),
    "tied embedding and decoder": Case(TiedDecoder, tokens, F.cross_entropy, lambda n: torch.randint(5, (n, 3))),
    "module used twice": layer(UsedTwice),
    "scalar parameters": layer(Scaled),
    "frozen parameters": layer(frozen_first_layer),
    "unused parameters": layer(WithUnused),
    "unused parameters and no regulariser": layer(WithUnused, l2=0.0),
}

# -- losses -----------------------------------------------------------------------------------------------------------


def real(n: int) -> Tensor:
    return torch.randn(n, 3)


def signs(n: int) -> Tensor:
    return torch.randint(2, (n, 3)) * 2.0 - 1.0


def bits(n: int) -> Tensor:
    return torch.randint(2, (n, 3)).float()


def soft_labels(n: int) -> Tensor:
    return torch.randn(n, 3).softmax(-1)


def two_labels_one_of_them_ignored_now_and_then(n: int) -> Tensor:
    labels = torch.randint(3, (n, 2))
    labels[::2, 1] = -100
    return labels


def gaussian(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.gaussian_nll_loss(outputs[:, :3], targets, F.softplus(outputs[:, 3:]) + 0.1)


def squared_hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    margins = outputs - outputs.gather(1, targets.unsqueeze(1)) + 1.0
    others = torch.arange(outputs.shape[1]) != targets.unsqueeze(1)
    return (margins.clamp(min=0.0).square() * others).sum(1).mean()


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=torch.tensor([0.2, 1.0, 3.0], dtype=outputs.dtype))


def bce_with_pos_weight(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(
        outputs, targets, pos_weight=torch.tensor([0.5, 1.0, 4.0], dtype=outputs.dtype)
    )


def loss(
    function: Loss,
    targets: Callable[[int], Tensor],
    outputs: int = 3,
    last: nn.Module | None = None,
    **options: Any,
) -> Case:
    return Case(
        lambda: nn.Sequential(perceptron(outputs), last or nn.Identity()), vectors, function, targets, **options
    )


LOSSES = {
    "mse": loss(F.mse_loss, real),
    "huber": loss(functools.partial(F.huber_loss, delta=0.5), real),
    "smooth_l1": loss(functools.partial(F.smooth_l1_loss, beta=0.5), real),
    "soft_margin": loss(F.soft_margin_loss, signs),
    "cross_entropy with class weights": loss(weighted, classes),
    "cross_entropy with ignore_index": loss(
        F.cross_entropy, two_labels_one_of_them_ignored_now_and_then, outputs=6, last=nn.Unflatten(1, (3, 2))
    ),
    "cross_entropy with label smoothing": loss(functools.partial(F.cross_entropy, label_smoothing=0.1), classes),
    "cross_entropy with soft labels": loss(F.cross_entropy, soft_labels),
    # torch adds 1e-12 to p(1 - p) in the second derivative; p(1 - p) > 0.01 here
    "bce of sigmoid": loss(F.binary_cross_entropy, bits, last=nn.Sigmoid(), inherent=1e-10),
    "bce with logits": loss(F.binary_cross_entropy_with_logits, bits),
    "bce with logits and pos_weight": loss(bce_with_pos_weight, bits),
    "nll": loss(F.nll_loss, classes, last=nn.LogSoftmax(-1)),
    "gaussian_nll": loss(gaussian, real, outputs=6, why_plain="data-dependent control flow"),
    "poisson_nll": loss(F.poisson_nll_loss, bits),
    "kl_div": loss(functools.partial(F.kl_div, reduction="batchmean"), soft_labels, last=nn.LogSoftmax(-1)),
    "squared hinge": loss(squared_hinge, classes),
}

CASES = LAYERS | LOSSES
cases = pytest.mark.parametrize("name", CASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@functools.cache
def curvature_reference(name: str, gnh: bool) -> Tensor:
    case = CASES[name]
    dense = dense_gauss_newton if gnh else dense_hessian
    return dense(case.reference_model(), case.objective, loader_batches(case.loader(N, torch.float64)))


@functools.cache
def gradient_references(name: str) -> tuple[Tensor, Tensor]:
    """Per-example gradients of the training loss and of the test loss."""
    case = CASES[name]
    model = case.reference_model()
    return (
        example_gradients(model, case.objective, case.loader(N, torch.float64)),
        query_gradients(model, case.objective, case.loader(MANY, torch.float64)),
    )


@cases
@pytest.mark.parametrize(
    ("dtype", "gnh"),
    [(torch.float64, False), (torch.float64, True), (torch.float32, True)],
    ids=["hessian", "gauss-newton", "gauss-newton-float32"],
)
def test_curvature_times_one_row_and_many(name: str, dtype: torch.dtype, gnh: bool) -> None:
    case = CASES[name]
    module = case.module(CGInfluenceModule, dtype, 0.0, gnh)
    matrix = curvature_reference(name, gnh)
    rows = torch.randn(5, len(matrix)).to(dtype)
    expected = rows.double() @ matrix
    size = float((rows.double().abs() @ matrix.abs()).max())
    bound: dict[str, float] = {"operations": SWEEPS * N * len(matrix), "scale": size, "inherent": case.inherent}
    assert_close(module.hvp(rows), expected, **bound)
    assert_close(module.hvp(rows[3]), expected[3], **bound)
    assert module.hvp(rows).dtype == dtype


@cases
@dtypes
def test_scores_are_products_of_gradients_of_batches_of_one(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    module = case.module(IdentityModule, dtype)
    train, queries = gradient_references(name)
    size = float(train.norm(dim=1).max() * queries.norm(dim=1).max()) / N
    bound: dict[str, float] = {"operations": SWEEPS * N * train.shape[1], "scale": size, "inherent": case.inherent}
    scores = train @ queries.mT / N
    few = list(range(FEW))
    assert_close(module.influence_matrix(), scores, **bound)
    assert_close(module.influence_matrix(None, few), scores[:, few], **bound)
    assert_close(module.influence_matrix([5, 0], few), scores[[5, 0]][:, few], **bound)
    bound["scale"] = float(train.square().sum(1).max()) / N
    assert_close(module.self_influences(), train.square().sum(1) / N, **bound)


@cases
def test_mean_gradients_are_size_weighted_over_the_batches_of_the_loader(name: str) -> None:
    case = CASES[name]
    module = case.module(IdentityModule, torch.float64)
    model = case.reference_model()
    train, queries = (case.loader(n, torch.float64) for n in (N, MANY))
    some, few = [6, 0, 5, 2], [8, 1, 3, 2]
    gradients = gradient_references(name)
    operations = SWEEPS * N * module._problem.space.size

    expected = mean_gradient(model, case.objective.train_loss, train, some)
    size = float(gradients[0].norm(dim=1).max())
    assert_close(module.train_loss_grad(some), expected, operations=operations, scale=size)

    of_queries = mean_gradient(model, case.objective.test_loss, queries, few)
    size = float(gradients[1].norm(dim=1).max())
    assert_close(module.test_loss_grad(few), of_queries, operations=operations, scale=size)

    size *= float(gradients[0].norm(dim=1).max()) / N
    scores = gradients[0][some] @ of_queries / N
    assert_close(module.influences(some, few), scores, operations=operations, scale=size, inherent=case.inherent)


@cases
@pytest.mark.parametrize("directions", [0, FEW], ids=["rows", "dots"])
def test_how_examples_are_taken(name: str, directions: int) -> None:
    case = CASES[name]
    module = case.module(IdentityModule, torch.float64)
    examples = ExampleGradients(
        module._problem.evaluation.train_loss, module._problem.evaluation, module._problem.train, "scores"
    )
    with module._problem.evaluation.session():
        if directions:
            list(examples.dots(range(N), torch.randn(directions, module._problem.space.size, dtype=torch.float64)))
        else:
            list(examples.rows(range(N)))
    assert bool(examples.why_plain) == bool(case.why_plain)
    assert case.why_plain in examples.why_plain


def test_max_norm_leaves_the_weight_of_the_model_alone() -> None:
    case = CASES["embedding with max_norm"]
    module = case.module(IdentityModule, torch.float64)
    before = module.flat_parameters()
    assert (module.model.inner.weight.norm(dim=1) > 1.0).any()
    module.influence_matrix()
    assert torch.equal(module.flat_parameters(), before)


@pytest.mark.parametrize("gnh", [False, True])
def test_a_loss_without_second_derivative_in_torch_is_an_error_not_a_number(gnh: bool) -> None:
    case = loss(F.multi_margin_loss, classes)
    module = case.module(CGInfluenceModule, torch.float64, 1.0, gnh)
    with pytest.raises(RuntimeError, match="multi_margin_loss_backward"):
        module.hvp(module.flat_parameters())
    train, queries = (
        mean_gradient(case.reference_model(), function, case.loader(n, torch.float64))
        for function, n in ((case.objective.train_loss, N), (case.objective.test_loss, MANY))
    )
    assert_close(module.train_loss_grad(range(N)), train, operations=SWEEPS * N * len(train))
    assert_close(module.test_loss_grad(range(MANY)), queries, operations=SWEEPS * N * len(train))


TOKENS = torch.tensor([[3, 0, 3, 2], [2, 2, 2, 2], [5, 1, 4, 0]])
BAGS = {
    "equal lengths": {"input": TOKENS},
    "offsets with an empty bag": {"input": TOKENS.flatten(), "offsets": torch.tensor([0, 2, 2, 7])},
    "last offset included": {
        "input": TOKENS.flatten(),
        "offsets": torch.tensor([0, 5, 6, 12]),
        "include_last_offset": True,
    },
}


@pytest.mark.parametrize("bags", BAGS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted sum"])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_embedding_bag_from_other_operators_is_torchs(
    bags: str, mode: str, padding_idx: int | None, max_norm: float | None
) -> None:
    options: dict[str, Any] = BAGS[bags] | {"mode": mode, "padding_idx": padding_idx, "max_norm": max_norm}
    if mode == "weighted sum":
        options |= {"mode": "sum", "per_sample_weights": torch.randn(options["input"].shape, dtype=torch.float64)}
    weight = torch.randn(6, 3, dtype=torch.float64)
    mine, theirs = (weight.clone().requires_grad_() for _ in range(2))
    with Composed():
        value = F.embedding_bag(weight=mine, **options)
    expected = F.embedding_bag(weight=theirs, **options)
    assert_close(value, expected, operations=TOKENS.numel() * 3)
    cotangent = torch.randn_like(expected)
    slope, expected_slope = (torch.autograd.grad(v, w, cotangent)[0] for v, w in ((value, mine), (expected, theirs)))
    assert_close(slope, expected_slope, operations=TOKENS.numel() * 3)
    assert torch.equal(mine.detach(), weight)


class SolvesCounted(IdentityModule):
    solved: list[int]

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        self.solved.append(len(vec))
        return vec


@pytest.mark.parametrize("name", ["linear", "lstm", "gaussian_nll"])
def test_self_influences_are_solved_together_also_where_examples_are_taken_one_at_a_time(name: str) -> None:
    module = CASES[name].module(SolvesCounted, torch.float64)
    module.solved = []
    module.self_influences()
    assert module.solved == [N]


def larger_under_vmap(outputs: Tensor, targets: Tensor) -> Tensor:
    factor = 1.0 if torch._C._functorch.maybe_current_level() is None else 2.0
    return factor * F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_a_loss_that_differs_under_vmap_is_found_out_and_taken_one_example_at_a_time(queries: int) -> None:
    case, plain = (loss(function, classes) for function in (larger_under_vmap, F.cross_entropy))
    module, reference = (c.module(IdentityModule, torch.float64) for c in (case, plain))
    expected = reference.influence_matrix(None, range(queries))
    assert_close(
        module.influence_matrix(None, range(queries)), expected, operations=SWEEPS * N * module._problem.space.size
    )
