"""Batches of every make, loaders of every setting, and the minibatches that LiSSA draws."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles import (
    IdentityModule,
    Supervised,
    assert_close,
    dense_hessian,
    example_gradients,
    loader_batches,
    query_gradients,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from torch_influence import BaseObjective, CGInfluenceModule, InfluenceModule, LiSSAInfluenceModule

pytestmark = pytest.mark.filterwarnings("error")

N, BATCH, INPUTS, CLASSES, L2 = 11, 4, 3, 3, 0.1


class Pairs(Dataset):
    """Examples (x, y)."""

    def __init__(self, n: int = N) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(n, INPUTS, generator=generator, dtype=torch.float64)
        self.y = torch.randint(CLASSES, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Unpacked(BaseObjective):
    """Softmax classification; ``unpack`` makes (inputs, targets) of a batch."""

    def __init__(self, unpack: Callable[[Any], tuple[Any, Tensor]]) -> None:
        self.unpack = unpack

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(self.unpack(batch)[0])

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, self.unpack(batch)[1])

    def train_regularization(self, params: Tensor) -> Tensor:
        return 0.5 * L2 * params.square().sum()

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        inputs, targets = self.unpack(batch)
        return F.cross_entropy(model(inputs), targets)


def network() -> nn.Module:
    """Always the same, and without a trace in the default generator."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


D = (INPUTS + 1) * 4 + (4 + 1) * CLASSES


def results(loader: DataLoader, unpack: Callable[[Any], tuple[Any, Tensor]], model: nn.Module) -> dict[str, Tensor]:
    objective = Unpacked(unpack)
    d = sum(p.numel() for p in model.parameters())
    v = torch.linspace(-1, 1, d, dtype=torch.float64)
    scores = IdentityModule(model, objective, loader, loader, "cpu")
    return {
        "hessian": CGInfluenceModule(model, objective, loader, loader, "cpu", 0.0).hvp(v),
        "gauss-newton": CGInfluenceModule(model, objective, loader, loader, "cpu", 0.0, gnh=True).hvp(v),
        "train gradient": scores.train_loss_grad([7, 2, 10, 3, 4]),
        "test gradient": scores.test_loss_grad([0, 9]),
        "few": scores.influence_matrix([3, 8, 1], [6, 2]),
        "many": scores.influence_matrix(),
        "self": scores.self_influences(),
    }


@functools.cache
def of_a_plain_loader() -> dict[str, Tensor]:
    return results(DataLoader(Pairs(), batch_size=BATCH), tuple, network())


def check(loader: DataLoader, unpack: Callable[[Any], tuple[Any, Tensor]] = tuple) -> None:
    """The same numbers as from a plain loader."""
    for name, value in results(loader, unpack, network()).items():
        expected = of_a_plain_loader()[name]
        assert_close(value, expected, operations=4 * N * D, scale=max(float(expected.abs().max()), 1.0))


# -- batches ----------------------------------------------------------------------------------------------------------

Couple = namedtuple("Couple", ["x", "y"])


@dataclasses.dataclass
class Record:
    x: Tensor
    y: Tensor
    name: str = "record"


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    inner: Record
    count: int = 1


class Encoding(UserDict):
    """Like the BatchEncoding of tokenizers: a mapping that moves itself, and gives attributes."""

    moved = 0

    def to(self, device: torch.device) -> Encoding:
        Encoding.moved += 1
        return Encoding({key: value.to(device) for key, value in self.items()})

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


def filled(kind: Callable[[], Any], x: Tensor, y: Tensor) -> Any:
    mapping = kind()
    mapping["x"], mapping["y"] = x, y
    return mapping


def by_key(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["x"], batch["y"]


def by_attribute(batch: Any) -> tuple[Tensor, Tensor]:
    return batch.x, batch.y


def of_type(kind: type, unpack: Callable[[Any], tuple[Any, Tensor]]) -> Callable[[Any], tuple[Any, Tensor]]:
    def checked(batch: Any) -> tuple[Any, Tensor]:
        assert type(batch) is kind
        return unpack(batch)

    return checked


def missing_default() -> Tensor:
    raise AssertionError("a default was asked for")


BATCHES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Any, Tensor]]]] = {
    "tuple": (lambda x, y: (x, y), of_type(tuple, tuple)),
    "list": (lambda x, y: [x, y], of_type(list, tuple)),
    "dict": (lambda x, y: {"x": x, "y": y}, of_type(dict, by_key)),
    "UserDict": (lambda x, y: filled(UserDict, x, y), of_type(UserDict, by_key)),
    "OrderedDict": (lambda x, y: filled(OrderedDict, x, y), of_type(OrderedDict, by_key)),
    "defaultdict": (lambda x, y: filled(lambda: defaultdict(missing_default), x, y), of_type(defaultdict, by_key)),
    "mapping proxy": (lambda x, y: types.MappingProxyType({"x": x, "y": y}), by_key),
    "namedtuple": (Couple, of_type(Couple, by_attribute)),
    "dataclass": (Record, of_type(Record, by_attribute)),
    "frozen dataclass in a tuple": (
        lambda x, y: (FrozenRecord(Record(x, y)), "tag"),
        lambda batch: (of_type(FrozenRecord, lambda b: b)(batch[0]).inner.x, batch[0].inner.y),
    ),
    "SimpleNamespace": (lambda x, y: types.SimpleNamespace(x=x, y=y), of_type(types.SimpleNamespace, by_attribute)),
    "None, str, int and float inside": (
        lambda x, y: {"x": x, "none": None, "task": "digits", "scale": 2, "shift": 0.5, "y": y},
        lambda b: ((b["x"] * b["scale"] + b["shift"] - b["shift"]) / (2 if b["none"] is None else 1), b["y"]),
    ),
    "nested": (lambda x, y: {"in": [{"x": x}, (None,)], "out": ((y,),)}, lambda b: (b["in"][0]["x"], b["out"][0][0])),
    "BatchEncoding": (lambda x, y: Encoding({"x": x, "y": y}), of_type(Encoding, by_attribute)),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_every_make(kind: str) -> None:
    make, unpack = BATCHES[kind]
    check(DataLoader(Pairs(), batch_size=BATCH, collate_fn=lambda items: make(*default_collate(items))), unpack)


def test_things_that_move_themselves_are_asked_to() -> None:
    before = Encoding.moved
    make, unpack = BATCHES["BatchEncoding"]
    check(DataLoader(Pairs(), batch_size=BATCH, collate_fn=lambda items: make(*default_collate(items))), unpack)
    assert Encoding.moved > before


# -- variable length --------------------------------------------------------------------------------------------------


class Sequences(Dataset):
    """Sequences of 1 to 4 vectors, and a label; the first ones of equal length."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        lengths = [2, 2, 2, 4, 1, 3, 4, 1, 2, 3, 4]
        self.x = [torch.randn(t, INPUTS, generator=generator, dtype=torch.float64) for t in lengths]
        self.y = torch.randint(CLASSES, (N,), generator=generator)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class MeanOfSequence(nn.Module):
    """Masks what is padded; takes a padded tensor with lengths, or a PackedSequence."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: tuple[Tensor, Tensor] | PackedSequence) -> Tensor:
        if isinstance(x, PackedSequence):
            padded, lengths = nn.utils.rnn.pad_packed_sequence(x, batch_first=True)
        else:
            padded, lengths = x
        mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
        hidden = self.body[1](self.body[0](padded)) * mask.unsqueeze(-1)
        return self.body[2](hidden.sum(1) / lengths.unsqueeze(1))


def padded(items: list[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    lengths = torch.tensor([len(x) for x, _ in items])
    return (pad_sequence([x for x, _ in items], batch_first=True), lengths), torch.stack([y for _, y in items])


def packed(items: list[tuple[Tensor, Tensor]]) -> tuple[PackedSequence, Tensor]:
    return pack_sequence([x for x, _ in items], enforce_sorted=False), torch.stack([y for _, y in items])


@pytest.mark.parametrize("collate", [padded, packed])
@pytest.mark.parametrize("batch_size", [1, BATCH])
def test_sequences_of_different_length(collate: Callable[[Any], Any], batch_size: int) -> None:
    model = MeanOfSequence()
    loader = DataLoader(Sequences(), batch_size=batch_size, collate_fn=collate)
    got = results(loader, tuple, model)
    reference = DataLoader(Sequences(), batch_size=1, collate_fn=padded)
    objective = Unpacked(tuple)
    matrix = dense_hessian(model, objective, ((padded([item]), 1) for item in Sequences()))
    gradients = example_gradients(model, objective, reference)
    v = torch.linspace(-1, 1, D, dtype=torch.float64)
    operations = 4 * N * D
    assert_close(got["hessian"], matrix @ v, operations=operations, scale=float((matrix.abs() @ v.abs()).max()))
    assert_close(got["self"], gradients.square().sum(1) / N, operations=operations)


# -- sparse and nested tensors ----------------------------------------------------------------------------------------


def each_mean(body: nn.Module, sequences: Any) -> Tensor:
    return torch.stack([body(t).mean(0) for t in sequences.unbind()])


def twice(x: Tensor) -> Tensor:
    """Every entry is there twice, by halves: not coalesced."""
    x = x.to_sparse()
    return torch.sparse_coo_tensor(x.indices().repeat(1, 2), x.values().repeat(2) / 2, x.shape)


LAYOUTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Tensor]]] = {
    "COO": (lambda x: torch.stack(x).to_sparse(), lambda body, x: body(x)),
    "COO, not coalesced": (lambda x: twice(torch.stack(x)), lambda body, x: x @ body.weight.T + body.bias),
    "CSR": (lambda x: torch.stack(x).to_sparse_csr(), lambda body, x: x @ body.weight.T + body.bias),
    "CSC": (lambda x: torch.stack(x).to_sparse_csc(), lambda body, x: body(x.to_dense())),
    "nested": (torch.nested.nested_tensor, each_mean),
    "jagged": (lambda x: torch.nested.nested_tensor(x, layout=torch.jagged), each_mean),
    "list": (list, lambda body, x: torch.stack([body(t).mean(0) for t in x])),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:Sparse .* tensor support")
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"gnh": True}, {"cache": False}], ids=str)
def test_sparse_and_ragged_batches(kind: str, options: dict[str, Any]) -> None:
    make, outputs = LAYOUTS[kind]
    sequences = kind in ("nested", "jagged", "list")
    inputs = Sequences().x if sequences else list(Pairs().x * (Pairs().x > 0))
    features, labels = [x.mean(0) if sequences else x for x in inputs], Pairs().y
    model = nn.Linear(INPUTS, CLASSES).double()
    plain = DataLoader([*zip(features, labels, strict=True)], batch_size=BATCH)
    loader = DataLoader(
        [*zip(inputs, labels, strict=True)],  # type: ignore[arg-type]
        batch_size=BATCH,
        collate_fn=lambda items: (make([x for x, _ in items]), torch.stack([y for _, y in items])),
    )

    class Odd(Unpacked):
        def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return outputs(model, batch[0])

        def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs(model, batch[0]), batch[1])

    objective = Unpacked(tuple)
    d, damp = (INPUTS + 1) * CLASSES, 0.5
    matrix = dense_hessian(model, objective, loader_batches(plain)) + damp * torch.eye(d, dtype=torch.float64)
    g = example_gradients(model, objective, plain)
    queries = query_gradients(model, objective, plain)
    expected = g @ torch.linalg.solve(matrix, queries.mT) / N
    module = InfluenceModule(model, Odd(tuple), loader, loader, "cpu", damp=damp, solver="direct", **options)
    for _ in range(2):
        got = module.influence_matrix()
        assert_close(got, expected, operations=4 * N * d, condition=float(torch.linalg.cond(matrix)))
    if options.get("cache", True):
        held = next(iter(loader))[0]
        assert module._problem.train.kept_bytes > 0
        if kind.startswith("COO"):
            once = held._indices().nbytes + held._values().nbytes
            assert once < module._problem.train.kept_bytes < once * N


# -- objectives that edit their batches -------------------------------------------------------------------------------


class InForward(Unpacked):
    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["in"][0].sub_(0.5).mul_(2))


class InLoss(Unpacked):
    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().train_loss_on_outputs(outputs * 1.0, batch | {"y": batch["y"].add_(1).remainder_(CLASSES)})


class Unseen(Unpacked):
    """Through ``.data``, which counts no version."""

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        batch["in"][0].data.sub_(0.5).mul_(2)
        return model(batch["in"][0])


class Popping(Unpacked):
    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["in"].pop())

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch["y"])


class Rarely(Unpacked):
    """Where the first feature is large, which it is in the first batch nowhere; each time again."""

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        x = batch["in"][0]
        large = x[:, 0] > 0.6
        if large.any():
            x[large, 0] = x[large, 0] * 0.5 + 0.5
        return model(x)


def by_name(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["in"][0], batch["y"]


def lowered(batch: Any) -> tuple[Tensor, Tensor]:
    x, y = by_name(batch)
    first = x[:, :1]
    return torch.cat([torch.where(first > 0.6, first * 0.5 + 0.5, first), x[:, 1:]], dim=1), y


EDITS: dict[str, tuple[type[Unpacked], Callable[[Any], tuple[Any, Tensor]]]] = {
    "forward": (InForward, lambda batch: ((batch["in"][0] - 0.5) * 2, batch["y"])),
    "loss": (InLoss, lambda batch: (batch["in"][0], (batch["y"] + 1) % CLASSES)),
    ".data": (Unseen, lambda batch: ((batch["in"][0] - 0.5) * 2, batch["y"])),
    "container": (Popping, by_name),
    "some batches": (Rarely, lowered),
}


class Rows(Pairs):
    """Named, and the first feature large in some of the later batches only."""

    def __init__(self) -> None:
        super().__init__(30)
        self.x[:, 0] = torch.where(torch.arange(30) % 9 == 5, 2.0, -1.0)

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return {"in": [x], "y": y}


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize(
    "options",
    [{}, {"cache": False}, {"gnh": True}, {"params": "2.*"}, {"gnh": True, "solver": "dual"}],
    ids=str,
)
def test_an_objective_may_edit_its_batches(kind: str, options: dict[str, Any]) -> None:
    editing, unpack = EDITS[kind]

    class Tested(editing):  # type: ignore[misc, valid-type]
        def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
            return self.train_loss_on_outputs(self.train_outputs(model, batch), batch)

    def module(objective: Unpacked) -> InfluenceModule:
        loader = DataLoader(data, batch_size=BATCH)
        return InfluenceModule(
            network(), objective, loader, loader, "cpu", **({"damp": 1.0, "solver": "direct"} | options)
        )

    data = Rows()
    expected = module(Unpacked(unpack)).influence_matrix()
    module_that_edits = module(Tested(by_name))
    rare = pytest.warns(UserWarning, match="edits some batches in place")
    with rare if kind == "some batches" else contextlib.nullcontext():
        first = module_that_edits.influence_matrix()
    for scores in (first, module_that_edits.influence_matrix()):
        assert_close(scores, expected, operations=4 * len(data) * D, condition=100.0)


@pytest.mark.parametrize("editing", [InForward, Rarely])
def test_items_that_are_not_batched_are_not_edited_in_the_data_set(editing: type[Unpacked]) -> None:
    data = [{"in": [item["in"][0][None]], "y": item["y"][None]} for item in Rows()]
    before = torch.cat([item["in"][0] for item in data])
    loader = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    module = IdentityModule(network(), editing(by_name), loader, None, "cpu")
    rare = pytest.warns(UserWarning, match="edits some batches in place")
    with rare if editing is Rarely else contextlib.nullcontext():
        module.train_loss_grad(range(30))
    assert torch.equal(torch.cat([item["in"][0] for item in data]), before)


# -- loaders ----------------------------------------------------------------------------------------------------------


class TwoThenRest:
    """A batch sampler without a batch_size, shuffling as it likes."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(N).tolist()
        for start in range(0, N, BATCH):
            yield order[start : start + BATCH]

    def __len__(self) -> int:
        return -(-N // BATCH)


LOADERS: dict[str, Callable[[], DataLoader]] = {
    "shuffle": lambda: DataLoader(Pairs(), batch_size=BATCH, shuffle=True),
    "drop_last": lambda: DataLoader(Pairs(), batch_size=BATCH, drop_last=True),
    "batch_sampler": lambda: DataLoader(
        Pairs(), batch_sampler=BatchSampler(RandomSampler(range(N)), BATCH, drop_last=True)
    ),
    "batch_sampler without batch_size": lambda: DataLoader(Pairs(), batch_sampler=TwoThenRest()),
    "a list as batch_sampler": lambda: DataLoader(Pairs(), batch_sampler=[[4, 3, 2, 1], [0, 9, 10], [8, 7, 6, 5]]),
    "workers": lambda: DataLoader(Pairs(), batch_size=BATCH, num_workers=2),
    "workers that persist": lambda: DataLoader(
        Pairs(), batch_size=BATCH, num_workers=1, persistent_workers=True, prefetch_factor=3
    ),
    "batches of one": lambda: DataLoader(Pairs(), batch_size=1),
    "one batch": lambda: DataLoader(Pairs(), batch_size=N),
    "a batch larger than the data": lambda: DataLoader(Pairs(), batch_size=10 * N),
    "subclass": lambda: type("Loader", (DataLoader,), {})(Pairs(), batch_size=BATCH),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_loaders_of_every_setting(kind: str) -> None:
    check(LOADERS[kind]())


class Shuffling(Sampler):
    """An order of its own, from a generator of its own."""

    def __init__(self, data: Dataset) -> None:
        self.data, self.generator = data, torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(self.data), generator=self.generator).tolist())

    def __len__(self) -> int:
        return len(self.data)


class Balancing(Shuffling):
    """As many as there are, with replacement."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randint(len(self.data), (len(self.data),), generator=self.generator).tolist())


class Buckets:
    """Batches of examples that are alike, dropping what makes no batch; ``forever`` draws them again and again."""

    def __init__(self, forever: bool = False) -> None:
        self.forever = forever

    def __iter__(self) -> Iterator[list[int]]:
        numbers = itertools.count() if self.forever else range(N // BATCH)
        return ([(BATCH * k + i) % N for i in range(BATCH)] for k in numbers)

    def __len__(self) -> int:
        return N // BATCH


SAMPLERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "order": (lambda: {"sampler": Shuffling(Pairs())}, ""),
    "all of a subset sampler": (lambda: {"sampler": SubsetRandomSampler([*range(N)])}, ""),
    "a last batch that is dropped": (lambda: {"batch_sampler": Buckets()}, ""),
    "repeats": (lambda: {"sampler": Balancing(Pairs())}, "Balancing"),
    "a list that repeats": (lambda: {"sampler": [3, 3, *range(9)]}, "list"),
    "repeats in batches": (lambda: {"batch_sampler": BatchSampler(Balancing(Pairs()), BATCH, False)}, "Balancing"),
    "batches without end": (lambda: {"batch_sampler": Buckets(forever=True)}, "Buckets"),
    "some batches": (lambda: {"batch_sampler": [[4, 3, 2, 1], [0]]}, "list"),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_what_selects_is_said_to_be_ignored_and_an_order_is_not(kind: str) -> None:
    make, named = SAMPLERS[kind]
    arguments = make()
    loader = DataLoader(Pairs(), **arguments)
    expected = pytest.warns(UserWarning, match=f"its {named} is ignored") if named else contextlib.nullcontext()
    with expected:
        IdentityModule(network(), Unpacked(tuple), loader, None, "cpu")
    generator = getattr(arguments.get("sampler"), "generator", None)
    if generator is not None:
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())  # a copy was drawn from


class Normalising(DataLoader):
    def __iter__(self) -> Any:
        return ((x - 1, y) for x, y in super().__iter__())


class Moving(DataLoader):
    def _get_iterator(self) -> Any:
        return super()._get_iterator()


class Prefetching:
    """All that a loader has, and an iteration of its own."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Any:
        return iter(self.loader)


def test_a_loader_that_iterates_in_a_way_of_its_own_is_warned_of() -> None:
    plain = DataLoader(Pairs(), batch_size=BATCH)
    for loader, words in (
        (Normalising(Pairs(), batch_size=BATCH), "Normalising has an __iter__ of its own"),
        (Moving(Pairs(), batch_size=BATCH), "Moving has an _get_iterator of its own"),
        (Prefetching(plain), "Prefetching has an __iter__ of its own"),
    ):
        with pytest.warns(UserWarning, match=f"train_loader: {words}.*collate_fn"):
            IdentityModule(network(), Unpacked(tuple), loader, None, "cpu")


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (Pairs(), "got Pairs; write DataLoader"),
        ([(1, 2)], "got list; write DataLoader"),
        (Subset(Pairs(), range(3)), "got Subset; write DataLoader"),
        (types.SimpleNamespace(dataset=Pairs(), sampler=None), "got SimpleNamespace; .*the DataLoader that this one"),
        ((batch for batch in ()), "got generator; .*need an index"),
    ],
)
def test_what_is_no_loader_is_refused_by_name(loader: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"train_loader: expected a torch.utils.data.DataLoader, {words}"):
        IdentityModule(network(), Unpacked(tuple), loader, None, "cpu")


def with_leading_axis(item: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return item[0].unsqueeze(0), item[1].unsqueeze(0)


@pytest.mark.parametrize("collate", [None, with_leading_axis])
def test_a_loader_that_does_not_batch_takes_each_item_for_an_example(collate: Callable[[Any], Any] | None) -> None:
    unpack = tuple if collate else lambda batch: with_leading_axis(batch)
    check(DataLoader(Pairs(), batch_size=None, collate_fn=collate), unpack)


def test_mean_gradients_of_a_subset_weigh_a_ragged_last_batch_by_its_size() -> None:
    model, objective = network(), Unpacked(tuple)
    loader = DataLoader(Pairs(), batch_size=BATCH)
    some = [9, 0, 3, 5, 2, 10]  # 4 + 2
    expected = example_gradients(model, objective, loader, some).mean(0)
    module = IdentityModule(model, objective, loader, None, "cpu")
    assert_close(module.train_loss_grad(some), expected, operations=4 * N * D)


def test_batches_yields_the_examples_in_the_order_asked_for_with_their_number() -> None:
    data = Pairs()
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)
    module = IdentityModule(network(), Unpacked(tuple), loader, loader, "cpu")
    order = [8, 1, 6, 0, 10]
    read = list(module.batches(idxs=order))
    assert [size for _, size in read] == [4, 1]
    assert torch.equal(torch.cat([batch[0] for batch, _ in read]), data.x[order])
    assert [size for _, size in module.batches(train=False, batch_size=5)] == [5, 5, 1]


# -- random state -----------------------------------------------------------------------------------------------------

DEPTH, REPEAT, SCALE, DAMP = 6, 2, 5.0, 0.2


def recursion(v: Tensor, loaders: list[DataLoader]) -> Tensor:
    """LiSSA written down, its minibatches from torch's own loaders: one loader per run, one batch per step."""
    model, objective = network(), Unpacked(tuple)
    total = torch.zeros_like(v)
    for loader in loaders:
        h = v.clone()
        for batch in loader:
            matrix = dense_hessian(model, objective, [(batch, len(batch[1]))])
            h = v + h - (matrix @ h + DAMP * h) / SCALE
        total += h / SCALE
    return total / len(loaders)


def drawing_loader(batch_size: int, generator: torch.Generator | None = None) -> DataLoader:
    sampler = RandomSampler(range(N), replacement=True, num_samples=DEPTH * batch_size, generator=generator)
    return DataLoader(Pairs(), batch_size=batch_size, sampler=sampler, generator=generator)


def lissa_module(batch_size: int, **options: Any) -> LiSSAInfluenceModule:
    loader = DataLoader(Pairs(), batch_size=batch_size, shuffle=True, drop_last=True)
    return LiSSAInfluenceModule(
        *(network(), Unpacked(tuple), loader, loader, "cpu", DAMP, REPEAT, DEPTH, SCALE), on_failure="ignore", **options
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_lissa_draws_what_a_loader_with_replacement_draws_from_the_default_generator(batch_size: int) -> None:
    v = torch.linspace(-1, 1, D, dtype=torch.float64)
    module = lissa_module(batch_size)
    torch.manual_seed(12)
    estimate = module.inverse_hvp(v)
    after = torch.get_rng_state()
    loaders = [drawing_loader(batch_size) for _ in range(REPEAT)]
    torch.manual_seed(12)
    assert_close(estimate, recursion(v, loaders), operations=4 * D * batch_size * DEPTH * REPEAT)
    assert torch.equal(after, torch.get_rng_state())


def test_seeded_scores_of_lissa_are_those_of_loaders_iterated_in_the_order_of_the_formula() -> None:
    """Test gradient first, which takes one draw as any pass of a loader does; then the runs."""
    module = lissa_module(3)
    torch.manual_seed(13)
    stest = module.stest([4, 7])

    loader = DataLoader(Pairs())
    gradient = IdentityModule(network(), Unpacked(tuple), loader, loader, "cpu")
    v = gradient.test_loss_grad([4, 7])
    torch.manual_seed(13)
    for _ in DataLoader(Pairs(), batch_size=3, sampler=[4, 7]):
        pass
    expected = recursion(v, [drawing_loader(3) for _ in range(REPEAT)])
    assert_close(stest, expected, operations=4 * D * 3 * DEPTH * REPEAT)


def test_lissa_with_a_generator_leaves_the_default_one_alone_and_repeats() -> None:
    v = torch.linspace(-1, 1, D, dtype=torch.float64)
    before = torch.get_rng_state()
    estimates = [lissa_module(3, generator=torch.Generator().manual_seed(seed)).inverse_hvp(v) for seed in (1, 1, 2)]
    assert torch.equal(estimates[0], estimates[1])
    assert not torch.equal(estimates[0], estimates[2])
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(1)
    expected = recursion(v, [drawing_loader(3, generator) for _ in range(REPEAT)])
    assert_close(estimates[0], expected, operations=4 * D * 3 * DEPTH * REPEAT)


def test_rows_solved_together_see_the_same_minibatches() -> None:
    rows = torch.randn(3, D, dtype=torch.float64)
    module = lissa_module(3)
    alone = []
    torch.manual_seed(14)
    together = module.inverse_hvp(rows)
    for row in rows:
        torch.manual_seed(14)
        alone.append(module.inverse_hvp(row))
    assert_close(together, torch.stack(alone), operations=4 * D * 3 * DEPTH * REPEAT)


class RandomlyAugmented(Pairs):
    """Draws from torch's default generator whenever an example is read."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        torch.rand(1)
        return super().__getitem__(index)


def test_the_check_for_summed_losses_does_not_draw_random_numbers() -> None:
    loader = DataLoader(RandomlyAugmented(), batch_sampler=TwoThenRest())
    module = IdentityModule(network(), Unpacked(tuple), loader, loader, "cpu")
    states = []
    for _ in range(2):  # the check runs in the first call only
        torch.manual_seed(15)
        module.train_loss_grad([0, 1, 2, 3, 4])
        module.test_loss_grad([0, 1])
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_building_a_module_does_not_draw_random_numbers() -> None:
    model, loader = network(), DataLoader(Pairs(), batch_sampler=TwoThenRest())
    before = torch.get_rng_state()
    CGInfluenceModule(model, Unpacked(tuple), loader, loader, "cpu", 0.1)
    assert torch.equal(torch.get_rng_state(), before)


# -- data sets --------------------------------------------------------------------------------------------------------


def test_a_data_set_whose_examples_are_bare_tensors() -> None:
    """No labels: an autoencoder's batch is one tensor."""
    x = Pairs().x
    model = nn.Linear(INPUTS, INPUTS).double()

    class Reconstruction(Supervised):
        def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch)

        def train_loss_on_outputs(self, outputs: Any, batch: Any) -> Tensor:
            return F.mse_loss(outputs, batch)

        def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
            return F.mse_loss(model(batch), batch)

    objective = Reconstruction(F.mse_loss, L2)
    loader = DataLoader(x, batch_size=BATCH)
    gradients = example_gradients(model, objective, loader)
    module = IdentityModule(model, objective, loader, loader, "cpu")
    assert_close(module.self_influences(), gradients.square().sum(1) / N, operations=4 * N * INPUTS * INPUTS)


def test_a_tensor_data_set_and_a_list_of_examples_are_the_same() -> None:
    data = Pairs()
    check(DataLoader(TensorDataset(data.x, data.y), batch_size=BATCH))
    check(DataLoader([data[i] for i in range(N)], batch_size=BATCH))


def test_examples_of_a_kind_that_is_edited_keep_their_places() -> None:
    rows = Pairs(12)
    data = [{"in": [rows[i][0][None] if i in (5, 6, 9) else rows[i][0]], "y": rows[i][1]} for i in range(12)]
    loader = DataLoader(data, batch_size=BATCH)  # the first batch, which is looked at before, has none of that kind
    stest = torch.linspace(-1.0, 1.0, D, dtype=torch.float64)

    def scores(edit: bool) -> Tensor:
        class OfAKind(Unpacked):
            def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
                x = batch["in"][0]
                if x.dim() == 3:
                    x = (x.sub_(0.25) if edit else x - 0.25).flatten(1)
                return model(x)

        module = InfluenceModule(network(), OfAKind(by_name), loader, None, "cpu", damp=1.0, cache=False)
        return module.influences(range(12), None, stest=stest)

    expected = scores(False)
    with pytest.warns(UserWarning, match="edits some batches in place"):
        assert_close(scores(True), expected, operations=4 * D)
