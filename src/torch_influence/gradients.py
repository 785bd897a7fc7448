"""First derivatives: mean gradients, pull-backs of many rows, and what is known of the graphs behind them."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from torch_influence.batches import Batches, weighted_mean
from torch_influence.caller import level_of_the_user
from torch_influence.evaluation import Evaluation
from torch_influence.leaves import leaves as leaves_of
from torch_influence.leaves import map_leaves
from torch_influence.parameters import ParameterSpace
from torch_influence.plan import agree
from torch_influence.switches import quiet_vmap

LossOfBatch: TypeAlias = Callable[[Sequence[Tensor], Any], Tensor]

_ROUNDINGS = 32  # by which two evaluations may differ where the device adds in any order
_DRAWS = 16  # evaluations of a loss that draws random numbers, to see a difference: a rare one hides in a few
_ROWS_AT_ONCE = 32  # cotangents in one batched backward: enough to amortise it, few enough to bound its memory


def mean_gradient(loss: LossOfBatch, evaluation: Evaluation, batches: Batches, indices: Sequence[int]) -> Tensor:
    """∇ (1/m) Σ loss over these m examples, a row [d]. One pass over them."""
    leaves = evaluation.leaves()
    return batches.mean(lambda batch: loss_gradient(loss, evaluation.space, leaves, batch), indices)


def loss_gradient(loss: LossOfBatch, space: ParameterSpace, leaves: Sequence[Tensor], batch: Any) -> Tensor:
    """Gradient of the loss of one batch, a row [d]."""
    return space.flatten(differentiate(loss(leaves, batch), leaves)).detach()


def regularizer_gradient(evaluation: Evaluation) -> Tensor | None:
    """∇reg, a row [d]; None for a number."""
    leaves = evaluation.leaves()
    value = evaluation.train_regularization(leaves)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None
    return evaluation.space.flatten(differentiate(value, leaves)).detach()


def differentiate(loss: Tensor, leaves: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """∂loss/∂leaves; zeros for leaves that the loss does not use, an error if it uses none."""
    if not loss.requires_grad:
        raise ValueError(
            "objective: expected a loss that depends on what it is differentiated by (the selected parameters, or the "
            "outputs), got one without a graph; is it computed under no_grad, from .detach() or .item(), or from "
            "other parameters than those in params=?"
        )
    return torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def grouping(loss: LossOfBatch, evaluation: Evaluation, batches: Batches, wanted: int) -> tuple[int | None, str]:
    """A batch size of up to ``wanted`` examples for passes over the data, or None and why it is the loader's own.

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
    # At a minimum the mean is nearly zero: rounding is as large as the parts make it.
    scale = weighted_mean((g.norm(), len(part)) for g, part in zip(gradients, parts, strict=True))
    if not (whole - mean).norm() <= torch.finfo(evaluation.space.pass_dtype).eps ** 0.5 * scale:
        return None, "the loss of a batch is not the mean of the losses of its examples"
    return min(max(wanted // own, 1) * own, n), ""


def saved_bytes(roots: Sequence[Tensor], besides: Any = ()) -> int:
    """Bytes of the tensors that the graphs behind these tensors hold for their backward passes.

    Without what they share with the tensors in ``besides`` (parameters, data), which are there anyway: a batch is often
    a view of all data.
    """
    anyway = {t.untyped_storage().data_ptr() for t in leaves_of(besides) if _is_strided(t)}
    storages: dict[int, int] = {}
    seen: set[Any] = set()
    nodes = [t.grad_fn for t in roots if t.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        for name in _saved_names(type(node)):
            try:
                saved = getattr(node, name)
            except RuntimeError:  # freed, or edited in place since: its own backward will say so
                continue
            for t in saved if isinstance(saved, list | tuple) else [saved]:
                if _is_strided(t) and (storage := t.untyped_storage()).data_ptr() not in anyway:
                    storages[storage.data_ptr()] = storage.nbytes()
        nodes += [following for following, _ in node.next_functions if following is not None]
    return sum(storages.values())


def _is_strided(t: Any) -> TypeGuard[Tensor]:
    return isinstance(t, Tensor) and t.layout is torch.strided


@functools.cache
def _saved_names(node: type) -> tuple[str, ...]:
    return tuple(name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors")


class PullBack:
    """vᵀ ∂outputs/∂inputs for rows of cotangents v, many at a time where that is verified to be the same.

    A batched backward (vmap over the graph) does many rows in one sweep. Its first rows are compared with the plain
    backward once for each ``stage`` (a caller's name for one kind of graph) in the life of this object; operators it
    can't batch, or batches differently, take the plain way.

    Attributes:
        why_plain: per stage that goes row by row, the reason.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._batched: dict[str, bool] = {}
        self.why_plain: dict[str, str] = {}

    def __call__(
        self, stage: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """outputs, inputs: tensors of one graph; cotangents: per output [k, *its shape]. Per input [k, *its shape]."""
        k = cotangents[0].shape[0]
        live = [i for i, out in enumerate(outputs) if out.requires_grad]
        if not live or k == 0:
            return tuple(x.new_zeros(k, *x.shape) for x in inputs)
        outs = [outputs[i] for i in live]
        cots = [cotangents[i].detach().to(outputs[i].dtype) for i in live]

        def one(*rows: Tensor) -> tuple[Tensor, ...]:
            grads = torch.autograd.grad(outs, inputs, rows, retain_graph=True, allow_unused=True)
            return tuple(x.new_zeros(x.shape) if g is None else g for g, x in zip(grads, inputs, strict=True))

        # Not autograd's own is_grads_batched: that does many operators (tanh's, log_softmax's) a row at a time.
        def backward(at: int | slice, batched: bool) -> tuple[Tensor, ...]:
            with quiet_vmap():
                return (torch.func.vmap(one) if batched else one)(*(c[at] for c in cots))

        if k > 1 and stage not in self._batched:
            self._batched[stage] = self._probe(stage, backward)
        if k == 1 or not self._batched[stage]:
            single = [backward(j, batched=False) for j in range(k)]
            return tuple(torch.stack(pieces) for pieces in zip(*single, strict=True))
        chunks = [backward(slice(j, j + _ROWS_AT_ONCE), batched=True) for j in range(0, k, _ROWS_AT_ONCE)]
        return tuple(torch.cat(pieces) for pieces in zip(*chunks, strict=True))

    def _probe(self, stage: str, backward: Callable[[int | slice, bool], tuple[Tensor, ...]]) -> bool:
        plain = [backward(j, False) for j in (0, 1)]
        try:
            fast = backward(slice(0, 2), True)
        except Exception as error:  # whatever vmap can't do; a mistake of the user's has shown in the plain backward
            self.why_plain[stage] = f"a backward of many rows at once failed: {error}"
            return False
        for j in (0, 1):
            one = torch.cat([g[j].reshape(-1) for g in fast])[None]
            if not agree(one, torch.cat([g.reshape(-1) for g in plain[j]])[None], self._dtype):
                self.why_plain[stage] = "a backward of many rows at once differs from the plain one"
                return False
        return True


def in_one_batch(batches: Batches, count: int = 8) -> tuple[list[int], Any] | None:
    """Up to so many examples, spread over the data, and one batch of them; None where no two make a batch.

    Spread, since neighbours may be of one class; where examples so far apart don't fit into one batch, neighbours.
    """
    if batches.batch_size is None:
        return None
    n, count = batches.n, min(count, max(batches.batch_size, 4), batches.n)
    if count < 2:
        return None
    for some in ([i * (n - 1) // (count - 1) for i in range(count)], list(range(count))):
        try:
            return some, batches.peek(some)
        except Exception:  # whatever a collate_fn says of ragged examples; mistakes show in the loader's own batches
            continue
    return None


def warn_if_not_a_mean(loss: str, evaluation: Evaluation, batches: Batches) -> None:
    """Warns if the loss of a batch is not the mean of the losses of its examples; ``loss`` names it.

    Evaluates up to eight examples, together and alone. The regulariser is left out, so an overridden train_loss, which
    may not tell it apart, is not checked; nor is a loss that is random, which ``randomness`` finds.
    """
    if loss == "train_loss" and evaluation.overrides_train_loss:
        return
    leaves = evaluation.leaves()

    def value(batch: Any) -> float:
        if loss == "test_loss":
            return evaluation.test_loss(leaves, batch).item()
        outputs = evaluation.train_outputs(leaves, batch)
        return evaluation.train_loss_on_outputs(leaves, outputs, batch).item()

    with _undisturbed(batches, leaves[0].device) as drawn:
        found = in_one_batch(batches)
        if found is None:
            return
        some, batch = found
        together, alone = value(batch), [value(batches.peek([i])) for i in some]
        again = value(batches.peek(some))
        if drawn():
            return
    mean, close = sum(alone) / len(alone), torch.finfo(evaluation.space.pass_dtype).eps ** 0.5 * sum(map(abs, alone))
    if abs(together - mean) <= close or abs(together - again) > close or not math.isfinite(together - mean):
        return
    if abs(together - sum(alone)) <= close:
        problem = (
            f"what looks like the sum (the loss of {len(some)} examples equals the sum of their losses); use "
            "reduction='mean', or scores are wrong by a factor of the batch size"
        )
    else:
        problem = (
            f"something else: {together:.6g} for {len(some)} examples together, and {mean:.6g} for the mean of their "
            "losses one by one. Gradients are those of examples one by one, the curvature is that of batches, so that "
            "scores are wrong. Where class weights (weight=), ignore_index or a count of tokens divides the loss, it "
            "depends on what else is in the batch: divide by a constant, as in "
            "(F.cross_entropy(outputs, y, weight=w, reduction='none') / w[all_labels].mean()).mean()"
        )
    warnings.warn(
        f"{loss}: expected the mean loss over the batch, got {problem}", UserWarning, stacklevel=level_of_the_user()
    )


class NondeterminismWarning(RuntimeWarning):
    """The loss of a batch is another each time that it is evaluated: gradients, products and solves are then wrong."""


def randomness(loss: str, evaluation: Evaluation, batches: Batches) -> str:
    """Whether the loss of the first batch is another when it is evaluated again: what to say of it, "" if it is not.

    Two evaluations, more only where random numbers are drawn. The default random states are left as they were.
    """
    batch = batches.peek(range(min(batches.batch_size or 1, batches.n)))
    leaves, dtype = evaluation.leaves(), evaluation.space.pass_dtype

    def value() -> Tensor:
        copied = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        return getattr(evaluation, loss)(leaves, copied).detach()  # the objective may edit its batch

    with _undisturbed(batches, leaves[0].device) as drawn:
        first = value()
        draws = drawn()
        for _ in range(_DRAWS if draws else 1):
            again = value()
            if (first.isfinite() | again.isfinite()) and not agree(again[None], first[None], dtype, _ROUNDINGS):
                how = ", and random numbers are drawn for it" if draws else ""
                return (
                    f"{loss}: the loss of the same batch is {float(first):.6g} once and {float(again):.6g} another "
                    f"time{how}. Something in the model or the objective is random, or keeps a state, in eval mode, so "
                    "that each gradient and each product with the curvature is that of another model: solves and "
                    "scores are wrong. Use nn.Dropout, or F.dropout(x, p, training=self.training), and add noise only "
                    "where self.training is set"
                )
    return ""


@contextlib.contextmanager
def _undisturbed(batches: Batches, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Leaves the default random states as they were, the device's too; yields whether numbers were drawn so far."""
    if device.type != "cuda":
        with batches.quietly() as drawn:
            yield drawn
        return
    with batches.quietly() as drawn, torch.random.fork_rng([device]):
        start = torch.cuda.get_rng_state(device)
        yield lambda: drawn() or not torch.equal(start, torch.cuda.get_rng_state(device))
