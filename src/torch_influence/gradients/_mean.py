"""First derivatives: mean gradients, pull-backs of many rows, and what is known of the graphs behind them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_influence.agreement import agree
from torch_influence.batches import Batches, held, parts, weighted_mean
from torch_influence.evaluation import Evaluation
from torch_influence.parameters import ParameterSpace
from torch_influence.switches import quiet_vmap

LossOfBatch: TypeAlias = Callable[[Sequence[Tensor], Any], Tensor]

NOT_A_MEAN = "the loss of a batch is not the mean of the losses of its examples"

_ROUNDINGS = 32  # roundings by which two evaluations may differ where the device adds in any order
_DRAWS = 16  # evaluations of a loss that draws random numbers: with few of them a rare difference would not show
_FEW = 2**16  # outputs that are multiplied by their cotangents in less time than anything else takes
_ROWS_AT_ONCE = 32  # cotangents in one batched backward: enough to amortise it, few enough to bound its memory


def mean_gradient(
    loss: LossOfBatch,
    evaluation: Evaluation,
    batches: Batches,
    indices: Sequence[int],
    look: Callable[[Any, int, Tensor, Sequence[int]], None] | None = None,
) -> Tensor:
    """Computes ∇ (1/m) Σ loss over these m examples, a row [d], in one pass over them.

    ``look`` is called with each batch, its size, its loss and its examples.
    """
    leaves = evaluation.leaves()

    def terms() -> Iterator[tuple[Tensor, int]]:
        start = 0
        for batch, size in batches.read(indices):
            value = loss(leaves, batch)
            yield evaluation.space.flatten(differentiate(value, leaves)).detach(), size
            if look is not None:
                look(batch, size, value.detach(), indices[start : start + size])
            start += size

    return weighted_mean(terms())


def loss_gradient(loss: LossOfBatch, space: ParameterSpace, leaves: Sequence[Tensor], batch: Any) -> Tensor:
    """Computes the gradient of the loss of one batch, a row [d]."""
    return space.flatten(differentiate(loss(leaves, batch), leaves)).detach()


def regularizer_gradient(evaluation: Evaluation) -> Tensor | None:
    """Computes ∇reg, a row [d]; None where the regulariser does not depend on the parameters."""
    leaves = evaluation.leaves()
    value = evaluation.train_regularization(leaves)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None
    return evaluation.space.flatten(differentiate(value, leaves)).detach()


def differentiate(loss: Tensor, leaves: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Computes ∂loss/∂leaves; zeros for leaves that the loss does not use, an error if it uses none."""
    if not loss.requires_grad:
        raise ValueError(
            "objective: expected a loss that depends on what it is differentiated by (the selected parameters, or the "
            "outputs), got one without a graph; is it computed under no_grad, from .detach(), .item() or "
            "argmax, or from other parameters than those in params=?"
        )
    return torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def pulled(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Computes Σ vᵀ ∂outputs/∂inputs for cotangents v; zeros for inputs that no output depends on. Keeps the graph.

    Few outputs are multiplied by their cotangents and summed. The numbers are the same; but to compare the shapes of
    cotangents torch first imports its symbolic ones, which takes a new process a third of a second.
    """
    options: dict[str, Any] = {"create_graph": create_graph, "retain_graph": True}
    options |= {"allow_unused": True, "materialize_grads": True}
    if sum(out.numel() for out in outputs) > _FEW:
        return torch.autograd.grad(outputs, inputs, cotangents, **options)
    savable = [v.clone() if v.is_inference() else v for v in cotangents]
    sums = [(out * v).sum() for out, v in zip(outputs, savable, strict=True)]
    return torch.autograd.grad(sums, inputs, **options)


def grouping(loss: LossOfBatch, evaluation: Evaluation, batches: Batches, wanted: int) -> tuple[int | None, str]:
    """Finds a batch size of up to ``wanted`` examples for passes over the data, or None and why the loader's own stays.

    Larger batches mean the same only where a loss is the mean of those of its examples. That is tested with up to 32 of
    the loader's batches, spread over the data so that whatever it is sorted by varies: the gradient of all of them as
    one batch against the weighted mean of theirs.
    """
    own, n = batches.batch_size, batches.n
    if own is None:
        return None, "the loader does not batch"
    step = min(own, -(-n // 2))
    starts = range(0, n, step)
    count = min(len(starts), 32, wanted // step)
    if count < 2:
        return None, "a batch of the loader is as much as should be done at once"
    stacked = batches.stacked()
    if stacked is None:
        return None, f"the data can't be regrouped: {batches.why_not_kept or 'batches are more than their examples'}"
    chosen = [starts[i * (len(starts) - 1) // (count - 1)] for i in range(count)]
    parts = [range(start, min(start + step, n)) for start in chosen]
    leaves = evaluation.leaves()
    gradients = [loss_gradient(loss, evaluation.space, leaves, stacked.batch(part)) for part in parts]
    mean = weighted_mean(zip([g.clone() for g in gradients], map(len, parts), strict=True))
    whole = loss_gradient(loss, evaluation.space, leaves, stacked.batch([i for part in parts for i in part]))
    # At a minimum the mean is nearly zero, so rounding is measured relative to the parts.
    scale = weighted_mean((g.norm(), len(part)) for g, part in zip(gradients, parts, strict=True))
    if not (whole - mean).norm() <= torch.finfo(evaluation.space.pass_dtype).eps ** 0.5 * scale:
        return None, NOT_A_MEAN
    return min(max(wanted // own, 1) * own, n), ""


def saved_bytes(roots: Sequence[Tensor], besides: Any = (), kept: Any = ()) -> int:
    """Counts the bytes of the tensors that the graphs behind these tensors hold, and of those in ``kept``.

    Memory that they share with the tensors in ``besides`` (parameters, data) is not counted, since it is there anyway:
    a batch is often a view of all data.
    """
    anyway = {storage.data_ptr() for t in parts(besides) for storage in _storages(t)}
    storages: dict[int, int] = {}

    def add(t: Any) -> None:
        for storage in _storages(t):
            if storage.data_ptr() not in anyway:
                storages[storage.data_ptr()] = storage.nbytes()

    for t in parts(kept):
        add(t)
    for node in nodes_behind(roots):
        for name in _saved_names(type(node)):
            try:
                saved = getattr(node, name)
            except RuntimeError:  # freed, or edited in place since: its own backward will say so
                continue
            for t in saved if isinstance(saved, list | tuple) else [saved]:
                add(t)
    return sum(storages.values())


def nodes_behind(roots: Sequence[Tensor]) -> Iterator[Node]:
    """Yields the nodes of the graphs behind these tensors, each once, in an order that only depends on structure."""
    seen: set[Node] = set()
    nodes = [t.grad_fn for t in roots if t.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        nodes += [following for following, _ in node.next_functions if following is not None]


def _storages(t: Any) -> list[Any]:
    return [part.untyped_storage() for part in held(t)] if isinstance(t, Tensor) else []


@functools.cache
def _saved_names(node: type) -> tuple[str, ...]:
    return tuple(name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors")


class Graph:
    """The outputs and inputs of a graph through which rows are pulled back.

    Args:
        stage: a caller's name for this kind of graph.
        outputs, inputs: tensors of one graph.
    """

    def __init__(self, stage: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self.stage, self.outputs, self.inputs = stage, outputs, inputs

    @functools.cached_property
    def structure(self) -> int:
        """A hash that is equal for graphs of the same operators, joined in the same way."""
        number = {node: i for i, node in enumerate(nodes_behind(self.outputs))}
        joined = (tuple(-1 if to is None else number[to] for to, _ in node.next_functions) for node in number)
        return hash((self.stage, tuple(type(node).__name__ for node in number), tuple(joined)))


class PullBack:
    """The map v -> vᵀ ∂outputs/∂inputs for rows of cotangents v, many at a time where that is verified to be the same.

    A batched backward (vmap over the graph) does many rows in one sweep. Its first rows are compared with the plain
    backward once for each structure of graphs in the life of this object, since some batches may take another way
    through the model than others; operators that can't be batched, or are batched differently, take the plain way.

    Attributes:
        why_plain: per stage that goes row by row, the reason.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._space = evaluation.space
        self._batched: dict[int, bool] = {}
        self.why_plain: dict[str, str] = {}

    def __call__(self, graph: Graph, cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Pulls back cotangents, one tensor [k, *its shape] per output; returns one [k, *its shape] per input."""
        inputs, k = graph.inputs, cotangents[0].shape[0]
        live = [i for i, out in enumerate(graph.outputs) if out.requires_grad]
        if not live or k == 0:
            return tuple(x.new_zeros(k, *x.shape) for x in inputs)
        outs = [graph.outputs[i] for i in live]
        cots = [cotangents[i].detach().to(out.dtype) for i, out in zip(live, outs, strict=True)]

        def one(*rows: Tensor) -> tuple[Tensor, ...]:
            grads = torch.autograd.grad(outs, inputs, rows, retain_graph=True, allow_unused=True)
            return tuple(x.new_zeros(x.shape) if g is None else g for g, x in zip(grads, inputs, strict=True))

        # Not autograd's own is_grads_batched: for many operators (tanh, log_softmax) it takes one row at a time.
        def backward(at: int | slice, batched: bool) -> tuple[Tensor, ...]:
            rows = [c[at] for c in cots]
            if not batched:
                return pulled(outs, inputs, rows)
            with quiet_vmap():
                return torch.func.vmap(one)(*rows)

        if k > 1 and graph.structure not in self._batched:
            self._batched[graph.structure] = self._probe(graph.stage, backward)
        if k == 1 or not self._batched[graph.structure]:
            single = [backward(j, batched=False) for j in range(k)]
            return tuple(torch.stack(pieces) for pieces in zip(*single, strict=True))
        chunks = [backward(slice(j, j + _ROWS_AT_ONCE), batched=True) for j in range(0, k, _ROWS_AT_ONCE)]
        return tuple(torch.cat(pieces) for pieces in zip(*chunks, strict=True))

    def _probe(self, stage: str, backward: Callable[[int | slice, bool], tuple[Tensor, ...]]) -> bool:
        plain = [backward(j, False) for j in (0, 1)]
        try:
            fast = backward(slice(0, 2), True)
        except Exception as error:  # what vmap can't do; a mistake of the user has shown in the plain backward
            self.why_plain[stage] = f"a backward of many rows at once failed: {error}"
            return False
        for j in (0, 1):
            one = torch.cat([g[j].reshape(-1) for g in fast])[None]
            if not agree(one, torch.cat([g.reshape(-1) for g in plain[j]])[None], self._space.pass_dtype):
                self.why_plain[stage] = "a backward of many rows at once differs from the plain one"
                return False
        return True


class NondeterminismWarning(RuntimeWarning):
    """The loss of a batch is another each time that it is evaluated: gradients, products and solves are then wrong."""


def randomness(loss: str, evaluation: Evaluation, batches: Batches) -> str:
    """Evaluates the loss of the first batch again and says what is wrong if it differs; "" if it does not.

    It evaluates twice, and more often only where random numbers are drawn. The default random states are left as they
    were. It also finds whether the loss edits its batches in place: ``Evaluation.edits``.
    """
    batch = batches.peek(range(min(batches.batch_size or 1, batches.n)))
    leaves, dtype = evaluation.leaves(), evaluation.space.pass_dtype

    def value() -> Tensor:
        return evaluation.examine(loss, leaves, batch).detach()

    with undisturbed(batches, leaves[0].device) as drawn:
        first = value()
        draws = drawn()
        for _ in range(_DRAWS if draws else 1):
            again = value()
            if (first.isfinite() | again.isfinite()) and not agree(again[None], first[None], dtype, _ROUNDINGS):
                how = ", and random numbers are drawn for it" if draws else ""
                return (
                    f"{loss}: the loss of the same batch is {float(first):.6g} once and {float(again):.6g} another "
                    f"time{how}. Something in the model or the objective is random, or keeps a state from call to call "
                    "(the hidden state of an RNN), in eval mode, so that each gradient and each product with the "
                    "curvature is that of another model: solves and scores are wrong. Use nn.Dropout, or F.dropout(x, "
                    "p, training=self.training), add noise only where self.training is set, and start each forward "
                    "without the state of the last"
                )
    return ""


@contextlib.contextmanager
def undisturbed(batches: Batches, device: torch.device, seed: int | None = None) -> Iterator[Callable[[], bool]]:
    """Leaves the random states, the device's too, as they were; yields a function that tells if numbers were drawn.

    The states start at a seed if one is given.
    """
    if device.type != "cuda":
        with batches.quietly(seed) as drawn:
            yield drawn
        return
    with batches.quietly(seed) as drawn, torch.random.fork_rng([device]):
        if seed is not None:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        start = torch.cuda.get_rng_state(device)
        yield lambda: drawn() or not torch.equal(start, torch.cuda.get_rng_state(device))
