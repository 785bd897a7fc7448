"""Data that are kept on the device: equal to what the loader gives, never stale, within the budget."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import IdentityModule, assert_close
from problems import Classification, loader, module, network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from torch_influence import BaseObjective, CGInfluenceModule, LiSSAInfluenceModule
from torch_influence.batches._batches import Batches
from torch_influence.batches._containers import same
from torch_influence.memory import free_memory

# Losses that couple the examples of a batch are among the cases; test_errors.py has what is said of them.
pytestmark = pytest.mark.filterwarnings("error", "ignore:.* over the batch, got something else")

N, BATCH, INPUTS, CLASSES, D = 14, 4, 4, 3, 43  # the last batch has 2
PROBED = {0, 7, 13}  # the first, the middle and the last example
LENGTHS = [3, 1, 2, 3, 3, 2, 1, 3, 1, 3, 2, 2, 1, 3]  # the longest in each batch, and the probed ones, have 3


class Examples(Dataset):
    """Examples of any make, counted when read: ``make`` gets (index, x [4], y)."""

    def __init__(self, make: Callable[[int, Tensor, Tensor], Any], n: int = N) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(n, INPUTS, generator=generator, dtype=torch.float64)
        self.y = torch.randint(CLASSES, (n,), generator=generator)
        self.make = make
        self.reads = 0
        self.log: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        self.log.append(index)
        return self.make(index, self.x[index], self.y[index])


def pairs(index: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y


def plain(**changes: Any) -> DataLoader:
    return DataLoader(Examples(pairs), **({"batch_size": BATCH} | changes))


def padded(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return pad_sequence([x for x, _ in items], batch_first=True), torch.stack([y for _, y in items])


def centred(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = default_collate(items)
    return x - x.mean(dim=0), y


def with_task(items: list[Any]) -> dict[str, Any]:
    x, y = default_collate(items)
    return {"x": x, "task": ["digits", None, 2], "y": y}


def by_key(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["x"], batch["y"]


def summed_rows(batch: Any) -> tuple[Tensor, Tensor]:
    return batch[0].cumsum(dim=1).sum(dim=1), batch[1]  # notices a row of padding at the end


def in_three_rows(index: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All of one shape, and zero from their length on."""
    return x * (torch.arange(3) < LENGTHS[index])[:, None], y


def trimmed(items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    x, y = default_collate(items)
    return [x[:, (x != 0).any(2).any(0)], y]


def scaled_by_the_rarest(items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    x, y = default_collate(items)
    return [x / (2 if (x == RARE).all(1).any() else 1), y]


class Gathering(Dataset):
    """Cuts what it reads together to the longest."""

    def __init__(self) -> None:
        self.rows = Examples(in_three_rows)

    def __len__(self) -> int:
        return N

    def __getitems__(self, indices: list[int]) -> list[Any]:
        longest = max(LENGTHS[i] for i in indices)
        return [(x[:longest], y) for x, y in (self.rows[i] for i in indices)]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]


def mean_row(batch: Any) -> tuple[Tensor, Tensor]:
    return batch[0].mean(dim=1), batch[1]


# name: (loader, how to unpack a batch, in what form it is kept)
KINDS: dict[str, tuple[Callable[[], DataLoader], Callable[[Any], tuple[Tensor, Tensor]], str]] = {
    "tensors": (plain, tuple, "stacked"),
    "TensorDataset": (lambda: DataLoader(TensorDataset(*TENSORS), batch_size=BATCH), tuple, "stacked"),
    "list": (lambda: DataLoader([*zip(*TENSORS, strict=True)], batch_size=BATCH), tuple, "stacked"),
    "one batch": (lambda: plain(batch_size=N + 3), tuple, "stacked"),
    "batches of one": (lambda: plain(batch_size=1), tuple, "stacked"),
    "dicts": (
        lambda: DataLoader(Examples(lambda i, x, y: {"x": x, "y": y}), batch_size=BATCH),
        by_key,
        "stacked",
    ),
    "arrays and numbers": (
        lambda: DataLoader(Examples(lambda i, x, y: (x.numpy(), int(y))), batch_size=BATCH),
        tuple,
        "stacked",
    ),
    "constants": (lambda: plain(collate_fn=with_task), by_key, "stacked"),
    "texts": (
        lambda: DataLoader(Examples(lambda i, x, y: (x, y, "a" * (i % 3))), batch_size=BATCH),
        lambda batch: (batch[0] * torch.tensor([[len(text)] for text in batch[2]]), batch[1]),
        "batches",
    ),
    "batch_sampler": (
        lambda: DataLoader(Examples(pairs), batch_sampler=BatchSampler(SequentialSampler(range(N)), BATCH, False)),
        tuple,
        "stacked",
    ),
    "batch_size=None": (
        lambda: DataLoader(Examples(lambda i, x, y: (x[None], y[None])), batch_size=None),
        tuple,
        "batches",
    ),
    "padding": (
        lambda: DataLoader(Examples(lambda i, x, y: (x.repeat(1 + i % 3, 1), y)), batch_size=BATCH, collate_fn=padded),
        summed_rows,
        "batches",
    ),
    "padding to the same length in every batch": (
        lambda: DataLoader(Examples(lambda i, x, y: (x.repeat(LENGTHS[i], 1), y)), batch_size=BATCH, collate_fn=padded),
        summed_rows,
        "batches",
    ),
    "trimming by content": (
        lambda: DataLoader(Examples(in_three_rows), batch_size=BATCH, collate_fn=trimmed),
        mean_row,
        "batches",
    ),
    "trimming in the data set": (lambda: DataLoader(Gathering(), batch_size=BATCH), mean_row, "batches"),
    "a rare value": (lambda: plain(collate_fn=scaled_by_the_rarest), tuple, "batches"),
    "a collate_fn of its own": (lambda: plain(collate_fn=lambda items: default_collate(items)), tuple, "stacked"),
    "a statistic of the batch": (lambda: plain(collate_fn=centred), tuple, "batches"),
    "a weight for all": (
        lambda: plain(collate_fn=lambda items: (*default_collate(items), torch.tensor([0.5, 2.0, 1.0, 1.0]))),
        lambda batch: (batch[0] * batch[2], batch[1]),
        "batches",
    ),
    "subset": (
        lambda: DataLoader(Subset(Examples(pairs, 3 * N), [*range(40, 40 - 2 * N, -2)]), batch_size=BATCH),
        tuple,
        "stacked",
    ),
    "workers": (lambda: plain(num_workers=2), tuple, "stacked"),
}
TENSORS = (Examples(pairs).x, Examples(pairs).y)
RARE = TENSORS[0][9]


class Unpacked(BaseObjective):
    def __init__(self, unpack: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        self.unpack = unpack

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(self.unpack(batch)[0])

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, self.unpack(batch)[1])

    def train_regularization(self, params: Tensor) -> Tensor:
        return 0.05 * params.square().sum()

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        x, y = self.unpack(batch)
        return F.cross_entropy(model(x), y)


def batches(of: DataLoader, cache: Any = True) -> Batches:
    return Batches(of, "train_loader", lambda batch: batch, lambda iterable, describe, total: iterable, cache)


def same_reads(one: Iterator[tuple[Any, int]], other: Iterator[tuple[Any, int]]) -> bool:
    ours, theirs = list(one), list(other)
    return [s for _, s in ours] == [s for _, s in theirs] and same([b for b, _ in ours], [b for b, _ in theirs])


def form(kept: Batches) -> str:
    if kept.stacked() is not None:
        return "stacked"
    return "batches" if kept.kept_bytes else ""


# -- equal to what the loader gives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_loader(kind: str) -> None:
    make, _, expected = KINDS[kind]
    from_memory, from_loader = batches(make(), True), batches(make(), False)
    assert same_reads(from_memory.read(), from_loader.read())  # the pass that fills
    assert from_memory.kept_bytes > 0
    assert from_memory.why_not_kept == ""
    assert form(from_memory) == expected
    assert from_loader.kept_bytes == 0
    for indices, size in ((None, None), (None, 3), (None, 1), ([5, 2, 11], None), ([9, 0, 3, 13, 1], 2), ([4], None)):
        assert same_reads(from_memory.read(indices, size), from_loader.read(indices, size))
    for indices in ([0], [13], [6, 1, 2]):
        assert same(from_memory.peek(indices), from_loader.peek(indices))


def results(kind: str, cache: Any) -> Iterator[Tensor]:
    make, unpack, _ = KINDS[kind]
    arguments = (network(), Unpacked(unpack), make(), make(), "cpu")
    scores = IdentityModule(*arguments, cache=cache)
    solver = CGInfluenceModule(*arguments, 1.0, gnh=True, rtol=1e-14, cache=cache)
    drawing = LiSSAInfluenceModule(*arguments, 1.0, 2, 5, 20.0, cache=cache, on_failure="ignore")
    v = torch.linspace(-1, 1, D, dtype=torch.float64)
    for _ in range(2):  # while the data are loaded, and when they are kept
        torch.manual_seed(4)
        yield solver.hvp(v)
        yield scores.train_loss_grad([7, 2, 10])
        yield scores.train_loss_grad(range(N))
        yield scores.test_loss_grad([1, 0])
        yield scores.influence_matrix([3, 8, 1], [6, 2])
        yield scores.influence_matrix()
        yield scores.self_influences()
        yield scores.stests([5, 4])
        yield solver.inverse_hvp(v)
        yield drawing.influences(range(N), [0])
        yield torch.get_rng_state()


# These give the same batches as "tensors", "padding" or "trimming by content", which the test above has seen.
ALIKE = {"TensorDataset", "list", "arrays and numbers", "batch_sampler", "a collate_fn of its own", "workers"}
ALIKE |= {"padding to the same length in every batch", "trimming in the data set"}
BUDGETED = {"tensors", "padding", "a statistic of the batch", "batch_size=None"}  # where a part of it is kept


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ALIKE])
def test_results_do_not_depend_on_the_cache(kind: str) -> None:
    without = list(results(kind, False))
    for cache in ("auto", 1500) if kind in BUDGETED else ("auto",):
        for got, expected in zip(results(kind, cache), without, strict=True):
            if expected.dtype == torch.uint8:
                assert torch.equal(got, expected)  # the random state
            else:
                # CG at damping 1 multiplies rounding by less than the largest eigenvalue of these problems, below 100
                scale = max(1.0, float(expected.abs().max()))
                assert_close(got, expected, operations=4 * N * D, condition=100.0, scale=scale)


@pytest.mark.parametrize("kind", ["tensors", "padding", "batch_size=None"])
@pytest.mark.parametrize("steps", [2, 9])
@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("subset", [None, [3, 9, 4]])
def test_minibatches_are_drawn_as_through_a_loader(
    kind: str, steps: int, own_generator: bool, subset: list[int] | None
) -> None:
    drawn, states = [], []
    for cache in (False, True):
        source = batches(KINDS[kind][0](), cache)
        generator = torch.Generator().manual_seed(8) if own_generator else None
        torch.manual_seed(8)
        drawn.append([[*source.sample(steps, indices=subset, generator=generator)] for _ in range(3)])
        assert (source.kept_bytes > 0) == (cache and (kind != "padding") and 3 * steps * (source.batch_size or 1) >= N)
        states.append((torch.get_rng_state(), generator.get_state() if generator else torch.zeros(1)))
    assert same(drawn[0], drawn[1])
    assert same(states[0], states[1])


def test_loading_and_probing_leave_random_states_alone() -> None:
    source = batches(plain())
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()  # noqa: NPY002
    assert source.stacked() is not None
    source.refresh()
    source.peek([1])
    after = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_stacked_gives_any_examples() -> None:
    data = Examples(pairs)
    stacked = batches(DataLoader(data, batch_size=BATCH)).stacked()
    assert stacked is not None
    assert torch.equal(stacked.tensors[0], data.x)
    assert stacked.nbytes == data.x.nbytes + data.y.nbytes
    for indices in ([3], [2, 3, 4], [4, 3, 2], [1, 1, 13], range(5, 9), range(0, 9, 2), torch.tensor([6, 0])):
        where = torch.as_tensor(indices)
        assert same(stacked.batch(indices), [data.x[where], data.y[where]])


def test_tensors_keep_a_memory_format_of_their_own() -> None:
    images = torch.randn(N, 3, 5, 5).to(memory_format=torch.channels_last)

    def collate(items: list[int]) -> list[Tensor]:
        return [images[items].contiguous(memory_format=torch.channels_last)]

    source = batches(DataLoader(range(N), batch_size=BATCH, collate_fn=collate))
    for _ in range(2):
        assert all(b[0].is_contiguous(memory_format=torch.channels_last) for b, _ in source.read())
    assert source.kept_bytes == images.nbytes


def test_data_are_kept_for_use_outside_of_inference_mode() -> None:
    it = IdentityModule(network(), Classification(), plain(), None, "cpu")
    expected = it.hvp(it.flat_parameters())
    it.clear_cache()
    with torch.inference_mode():
        for _ in it.batches():
            pass
    assert torch.equal(it.hvp(it.flat_parameters()), expected)
    assert it._problem.train.kept_bytes > 0


# -- how often data are read ------------------------------------------------------------------------------------------


def test_two_whole_passes_read_the_data_once() -> None:
    for make, probes in ((plain, 40), (KINDS["padding"][0], 40), (KINDS["batch_size=None"][0], 40)):
        of = make()
        source = batches(of)
        for _ in source.read():
            pass
        data = of.dataset
        counts = [data.log.count(i) for i in range(N)]
        assert sum(counts) - N <= probes
        # Not probed: once; but one of each length is compared with what was stacked.
        assert sum(count > 1 for count in counts) <= len(PROBED) + 2
        so_far = data.reads
        for _ in range(3):
            for _ in source.read():
                pass
        assert data.reads == so_far


def test_reading_a_few_examples_does_not_load_all_but_reading_them_often_does() -> None:
    of = plain()
    source = batches(of)
    for _ in source.read([1, 2, 3]):
        pass
    assert of.dataset.log == [1, 2, 3]
    assert source.stacked(reading=5) is None
    assert "not been read in whole" in source.why_not_kept
    assert of.dataset.log == [1, 2, 3]
    for _ in range(3):
        for _ in source.read([1, 2, 3]):
            pass
    assert source.kept_bytes == 0
    for _ in source.read([1, 2]):
        pass
    assert source.kept_bytes > 0


@pytest.mark.parametrize("kind", ["padding", "a statistic of the batch"])
def test_scores_of_data_that_do_not_stack_do_not_load_what_is_of_no_use_to_them(kind: str) -> None:
    of = KINDS[kind][0]()
    source = batches(of)
    for _ in source.read(None, 1):
        pass
    assert source.kept_bytes == 0
    assert of.dataset.reads <= N + 20


# -- the budget -------------------------------------------------------------------------------------------------------

NBYTES = N * (INPUTS * 8 + 8)


@pytest.mark.parametrize("kind", ["tensors", "a statistic of the batch"])
@pytest.mark.parametrize(("cache", "kept"), [(NBYTES, True), (NBYTES - 1, False), (0, False), (10**9, True)])
def test_budget_in_bytes(kind: str, cache: int, kept: bool) -> None:
    source = batches(KINDS[kind][0](), cache)
    for _ in range(2):
        assert same_reads(source.read(), batches(KINDS[kind][0](), False).read())
    assert source.kept_bytes == (NBYTES if kept else 0)
    assert (source.why_not_kept == "") == kept
    if not kept:
        assert f"the budget is {cache:,}" in source.why_not_kept


def test_data_that_grow_beyond_the_budget_are_let_go() -> None:
    """The first batch promises less than there is."""
    of = DataLoader(
        Examples(lambda i, x, y: (x.repeat(1 if i < BATCH else 50, 1), y)), batch_size=BATCH, collate_fn=padded
    )
    source = batches(of, 3 * NBYTES)
    for _ in range(2):
        assert [len(batch[1]) for batch, _ in source.read()] == [4, 4, 4, 2]
    assert source.kept_bytes == 0
    assert "the budget is" in source.why_not_kept


def test_automatic_budget_is_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, kept in ((4 * NBYTES, True), (4 * NBYTES - 1, False)):
        monkeypatch.setattr("torch_influence.memory.free_memory", lambda device, free=free: free)
        source = batches(plain(), "auto")
        for _ in source.read():
            pass
        assert (source.kept_bytes > 0) == kept


MEMINFO = {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:    4000 kB\n"}
UNLIMITED = str(2**63 - 4096)
GROUPS: dict[str, tuple[dict[str, str], int]] = {
    "no groups": ({}, 4000 * 1024),
    "no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 4000 * 1024),
    "version 2": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "1000000\n",
            "sys/fs/cgroup/memory.current": "700000\n",
            "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 20000\n",
        },
        320_000,
    ),
    "version 2, the limit of a group around it": (
        {
            "proc/self/cgroup": "0::/jobs/7\n",
            "sys/fs/cgroup/jobs/7/memory.max": "max\n",
            "sys/fs/cgroup/jobs/7/memory.current": "5\n",
            "sys/fs/cgroup/jobs/memory.max": "1000000\n",
            "sys/fs/cgroup/jobs/memory.current": "900000\n",
        },
        100_000,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{UNLIMITED}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "9000000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000000\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "700000\n",
            "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 20000\n",
        },
        320_000,
    ),
    "version 1, seen from inside a container": (
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "700000\n",
        },
        300_000,
    ),
    "more used than allowed": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "2000\n",
        },
        0,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_free_memory_is_what_the_machine_and_its_control_groups_leave(name: str, tmp_path: Path) -> None:
    files, expected = GROUPS[name]
    for path, text in (MEMINFO | files).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert free_memory(torch.device("cpu"), tmp_path) == expected


def test_free_memory_without_any_such_file(tmp_path: Path) -> None:
    assert 0 < free_memory(torch.device("cpu"), tmp_path) < 2**50
    assert 0 < free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    ("cache", "kind", "words"),
    [
        (-1, ValueError, "cache: expected a number of bytes >= 0, got -1"),
        ("all", ValueError, "cache: expected True, False, 'auto' or a number of bytes .int., got 'all'"),
        (1e9, TypeError, "cache: expected .* got 1000000000.0 of float; write 1000000000"),
        (None, TypeError, "cache: expected .* got None of NoneType"),
    ],
)
def test_wrong_budget(cache: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        module(cache=cache)


# -- what is not kept -------------------------------------------------------------------------------------------------


def flipped(chance: float) -> Tensor:
    return torch.tensor(-1.0 if chance < 0.5 else 1.0, dtype=torch.float64)


AUGMENTED: dict[str, Callable[[int, Tensor, Tensor], Any]] = {
    "torch": lambda i, x, y: (x + torch.randn(INPUTS), y),
    "numpy": lambda i, x, y: (x * float(np.random.rand()), y),  # noqa: NPY002
    "python": lambda i, x, y: (x * random.random(), y),
    "torch flip": lambda i, x, y: (x * flipped(float(torch.rand(()))), y),
    "python flip": lambda i, x, y: (x * flipped(random.random()), y),
}


@pytest.mark.parametrize("kind", AUGMENTED)
@pytest.mark.parametrize("seed", range(3))
def test_random_augmentation_is_reported_and_not_kept(kind: str, seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    source = batches(DataLoader(Examples(AUGMENTED[kind]), batch_size=BATCH), "auto")
    with pytest.warns(UserWarning, match="train_loader: the data set gives other data each time it is read") as caught:
        first = list(source.read())
    assert len(caught) == 1
    assert not same(first, list(source.read()))  # and no second warning
    assert source.kept_bytes == 0
    assert "other data each time" in source.why_not_kept


def test_a_generator_of_the_data_sets_own_is_noticed() -> None:
    own = np.random.default_rng(3)
    source = batches(DataLoader(Examples(lambda i, x, y: (x * own.random(), y)), batch_size=BATCH), "auto")
    with pytest.warns(UserWarning, match="other data each time"):
        list(source.read())
    assert source.kept_bytes == 0


class Flip:
    """Half of the time, by a generator of its own."""

    def __init__(self, generator: Any) -> None:
        self.draw = {
            torch.Generator: lambda: float(torch.rand((), generator=generator)),
            np.random.Generator: lambda: generator.random(),
        }.get(type(generator), lambda: generator.random())

    def __call__(self, x: Tensor) -> Tensor:
        return x * flipped(self.draw())


OWN: dict[str, Callable[[int], Any]] = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "numpy": np.random.default_rng,
    "legacy numpy": np.random.RandomState,
    "python": random.Random,
}


@pytest.mark.parametrize("kind", OWN)
def test_flips_by_a_generator_in_a_transform_are_reported_and_not_kept(kind: str) -> None:
    for seed in range(6):  # in three examples, read twice, no flip is seen for one seed of eight
        transforms = [Flip(OWN[kind](seed))]
        source = batches(DataLoader(Examples(lambda i, x, y, t=transforms: (t[0](x), y)), batch_size=BATCH), "auto")
        with pytest.warns(UserWarning, match="other data each time"):
            list(source.read())
        assert source.kept_bytes == 0


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("cache", ["auto", True])
def test_augmentation_of_a_rare_kind_of_example_is_noticed_when_it_is_read(own: bool, cache: Any) -> None:
    generator = torch.Generator() if own else torch.default_generator

    def augmented(index: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x + torch.randn(INPUTS, generator=generator) if index == 9 else x), y

    source = batches(DataLoader(Examples(augmented), batch_size=BATCH), cache)
    with pytest.warns(UserWarning, match="other data each time") as caught:
        first = list(source.read())
    assert len(caught) == 1
    assert same(first, list(source.read())) == (cache is True)
    assert (source.kept_bytes > 0) == (cache is True)


def test_augmentation_is_noticed_in_data_that_turn_out_too_large_as_well() -> None:
    def augmented(index: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x + torch.randn(INPUTS) if index == 5 else x
        return x.repeat(50 if index == 9 else 1, 1), y

    source = batches(DataLoader(Examples(augmented), batch_size=BATCH, collate_fn=padded), 3 * NBYTES)
    with pytest.warns(UserWarning, match="other data each time") as caught:
        list(source.read())
    assert len(caught) == 1
    assert "other data each time" in source.why_not_kept
    assert not source.watched()


def test_draws_of_whoever_uses_the_batches_are_no_draws_of_the_data() -> None:
    source = batches(plain())
    for _ in source.read():
        torch.rand(1)
    assert source.kept_bytes > 0


def test_cache_true_freezes_one_draw_and_says_so() -> None:
    source = batches(DataLoader(Examples(AUGMENTED["torch"]), batch_size=BATCH), True)
    with pytest.warns(UserWarning, match="train_loader.*cache=True keeps one draw"):
        first = list(source.read())
    assert same(first, list(source.read()))
    source.refresh()
    assert same(first, list(source.read()))
    assert form(source) == "stacked"


def test_draws_without_effect_are_no_reason_to_warn_but_data_are_not_kept() -> None:
    """So that the random state after a pass does not depend on the cache."""

    def draws(index: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        torch.rand(1)
        return x, y

    states = []
    for cache in (False, "auto"):
        torch.manual_seed(1)
        source = batches(DataLoader(Examples(draws), batch_size=BATCH), cache)
        for _ in range(2):
            list(source.read())
        assert source.kept_bytes == 0
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_batches_that_are_edited_in_place_are_not_served_again() -> None:
    class Editing(Classification):
        def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
            batch[0].mul_(0.5)
            return super().train_outputs(model, batch)

    class Plain(Classification):
        def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0] * 0.5)

    v = torch.ones(D, dtype=torch.float64)
    editing = module(objective=Editing(), damp=1.0)
    expected = module(objective=Plain(), damp=1.0).hvp(v)
    for _ in range(3):
        assert_close(editing.hvp(v), expected, operations=4 * 23 * D)
    assert editing._problem.train.kept_bytes > 0  # each evaluation gets a copy

    source = batches(plain(collate_fn=centred))  # who reads batches may edit them: those that would be kept as they are
    for _ in range(2):
        assert same_reads(source.read(), batches(plain(collate_fn=centred), False).read())
        source.clear()
        for batch, _ in source.read():
            batch[0].zero_()
    assert source.kept_bytes == 0

    source = batches(plain())  # and where it begins only once they are kept
    expected_reads = list(batches(plain(), False).read())
    list(source.read())
    for batch, _ in source.read():
        batch[0].zero_()
    assert same(list(source.read()), expected_reads)
    assert source.kept_bytes == 0


def test_containers_may_be_edited() -> None:
    of = DataLoader(Examples(lambda i, x, y: {"x": x, "y": y, "text": str(i)}), batch_size=BATCH)
    source = batches(of)
    for _ in range(3):
        assert [len(batch.pop("text")) + len(batch.pop("y")) for batch, _ in source.read()] == [8, 8, 8, 4]
    assert form(source) == "batches"


def test_batches_that_require_grad_or_hold_unknown_things_are_not_kept() -> None:
    class Thing:
        pass

    for collate, words in (
        (lambda items: [x.requires_grad_() for x in default_collate(items)[:1]], "require grad"),
        (lambda items: [*default_collate(items), Thing()], "objects of Thing"),
    ):
        source = batches(plain(collate_fn=collate), "auto")
        for _ in range(2):
            list(source.read())
        assert source.kept_bytes == 0
        assert words in source.why_not_kept


# -- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("broken file"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 5, 7])
def test_what_ends_early_leaves_nothing_kept(error: BaseException, at: int) -> None:
    broken = [True]

    def fails(index: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if broken[0] and index == at:
            raise error
        return x, y

    source = batches(DataLoader(Examples(fails), batch_size=BATCH))
    for _ in range(2):
        with pytest.raises(type(error)):
            list(source.read())
        assert source.kept_bytes == 0
    broken[0] = False
    assert same_reads(source.read(), batches(plain(), False).read())
    assert source.kept_bytes == NBYTES


def test_a_pass_that_is_left_and_a_pass_inside_a_pass() -> None:
    source, expected = batches(plain()), list(batches(plain(), False).read())
    for _ in source.read():
        break
    assert source.kept_bytes == 0
    outer = source.read()
    first = next(outer)
    assert same(list(source.read()), expected)
    assert same([first, *outer], expected)
    assert source.kept_bytes == NBYTES
    assert same(list(source.read()), expected)


# -- never stale ------------------------------------------------------------------------------------------------------

NOT_PROBED = 5


class Arrays(Dataset):
    def __init__(self) -> None:
        self.x, self.y = TENSORS[0].numpy().copy(), [int(label) for label in TENSORS[1]]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.x[index], self.y[index]


def relabel(data: Any) -> None:
    data.tensors[1][NOT_PROBED] = (data.tensors[1][NOT_PROBED] + 1) % CLASSES


def relabel_subset(data: Any) -> None:
    relabel(data.dataset)


def replace_tensors(data: Any) -> None:
    data.tensors = (data.tensors[0] * 2, data.tensors[1])


def append(data: Any) -> None:
    data.tensors = tuple(torch.cat([t, t[:3]]) for t in data.tensors)


def other_subset(data: Any) -> None:
    data.indices[NOT_PROBED] = 1 - data.indices[NOT_PROBED] % 2


def relabel_list(data: Any) -> None:
    data.y[NOT_PROBED] = (data.y[NOT_PROBED] + 1) % CLASSES


def edit_probed_array(data: Any) -> None:
    data.x[7] += 1


def replace_array(data: Any) -> None:
    data.x = data.x * 2


def replace_item(data: Any) -> None:
    data[NOT_PROBED] = (data[NOT_PROBED][0], (data[NOT_PROBED][1] + 1) % CLASSES)


def grow(data: Any) -> None:
    data.extend(data[:2])


def tensor_data() -> TensorDataset:
    return TensorDataset(*(t.clone() for t in TENSORS))


CHANGES: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (tensor_data, relabel),
    (tensor_data, replace_tensors),
    (tensor_data, append),
    (lambda: Subset(tensor_data(), [*range(N)]), relabel_subset),
    (lambda: Subset(tensor_data(), [*range(N)]), other_subset),
    (Arrays, relabel_list),
    (Arrays, edit_probed_array),
    (Arrays, replace_array),
    (lambda: [*zip(*TENSORS, strict=True)], replace_item),
    (lambda: [*zip(*TENSORS, strict=True)], grow),
]


@pytest.mark.parametrize(("make", "change"), CHANGES, ids=[change.__name__ for _, change in CHANGES])
@pytest.mark.parametrize("collate", [default_collate, centred])
def test_data_that_change_are_noticed(make: Callable[[], Any], change: Callable[[Any], None], collate: Any) -> None:
    data = make()
    of = DataLoader(data, batch_size=BATCH, collate_fn=collate)
    it = IdentityModule(network(), Classification(), of, of, "cpu")
    v = torch.ones(D, dtype=torch.float64)
    stest = torch.linspace(-1, 1, D, dtype=torch.float64)

    def results(it: IdentityModule) -> list[Tensor]:
        reads = torch.cat([batch[0] for batch, _ in it.batches()])
        scores = it.influences(range(len(data)), None, stest)
        return [it.hvp(v), it.train_loss_grad(range(len(data))), scores, it.influence_matrix(), reads]

    first = results(it)
    assert it._problem.train.kept_bytes > 0
    assert same(results(it), first)  # nothing has changed
    change(data)
    fresh = results(IdentityModule(network(), Classification(), of, of, "cpu", cache=False))
    assert not same(fresh, first)
    for got, expected in zip(results(it), fresh, strict=True):
        assert_close(got, expected, operations=4 * N * D)
    it.batches()
    assert it._problem.train.kept_bytes > 0  # and kept again


@pytest.mark.parametrize("call", ["hvp", "train_loss_grad", "influences", "influence_matrix", "self_influences"])
def test_every_call_looks(call: str) -> None:
    of = DataLoader(tensor_data(), batch_size=BATCH)
    it = IdentityModule(network(), Classification(), of, of, "cpu")
    v = torch.ones(D, dtype=torch.float64)
    arguments = {"hvp": (v,), "train_loss_grad": ([NOT_PROBED],), "influences": ([NOT_PROBED], None, v)}.get(call, ())
    first = getattr(it, call)(*arguments)
    list(it.batches())
    assert it._problem.train.kept_bytes > 0
    relabel(of.dataset)
    second = getattr(it, call)(*arguments)
    assert not torch.equal(first, second)
    it.clear_cache()
    assert_close(second, getattr(it, call)(*arguments), operations=4 * N * D)


def test_clear_cache_is_for_edits_that_are_not_noticed() -> None:
    data = Arrays()
    of = DataLoader(data, batch_size=BATCH)
    it = IdentityModule(network(), Classification(), of, None, "cpu")
    v = torch.ones(D, dtype=torch.float64)
    before = it.hvp(v)
    data.x[NOT_PROBED] += 1
    assert torch.equal(it.hvp(v), before)  # as documented
    it.clear_cache()
    fresh = IdentityModule(network(), Classification(), of, None, "cpu", cache=False).hvp(v)
    assert not torch.equal(fresh, before)
    assert_close(it.hvp(v), fresh, operations=4 * N * D)


def test_what_a_data_set_counts_about_itself_is_no_change() -> None:
    of = plain()
    source = batches(of)
    stacked = source.stacked()
    assert stacked is not None
    for _ in range(3):
        source.refresh()
        assert source.stacked() is stacked


# -- scores from stacked data -----------------------------------------------------------------------------------------


def test_many_examples_at_once_are_still_compared_with_one_at_a_time() -> None:
    class Differs(Classification):
        """Other losses under vmap."""

        def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
            mapped = torch._C._functorch.maybe_current_level() is not None
            return F.cross_entropy(outputs, batch[1]) * (3 if mapped else 1)

    stest = torch.ones(D, dtype=torch.float64)
    odd = module(objective=Differs(), cache=True)
    assert odd._problem.train.stacked() is not None
    assert_close(
        odd.influences(range(23), None, stest), module().influences(range(23), None, stest), operations=100 * D
    )


def test_progress_bars_count_what_they_announce(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    def bar(iterable: Any, describe: str, total: int | None) -> Iterator[Any]:
        items = list(iterable)
        bars.append((describe, len(items), total))
        return iter(items)

    it = IdentityModule(network(), Classification(), loader(n=600), loader(), "cpu")
    monkeypatch.setattr(it._problem.train, "bar", bar)
    for _ in range(2):
        it.influences(range(600), None, torch.ones(D, dtype=torch.float64))
    assert [describe for describe, _, _ in bars] == ["scores"] * 2
    assert all(count == total for _, count, total in bars)


def test_what_begins_and_ends_as_a_range_need_not_be_one() -> None:
    data = Examples(pairs)
    stacked = batches(DataLoader(data, batch_size=BATCH)).stacked()
    assert stacked is not None
    indices = [3, 6, 4, 5, 7]
    assert same(stacked.batch(indices), [data.x[indices], data.y[indices]])
