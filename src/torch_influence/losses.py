"""Checks of the user's losses: is the loss of a batch the mean of the losses of its examples, and how precise is it?"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_influence.batches import Batches, is_dense, map_parts, parts, put_together, take_apart
from torch_influence.caller import level_of_the_user
from torch_influence.evaluation import Evaluation
from torch_influence.gradients import nodes_behind, undisturbed
from torch_influence.switches import quiet_vmap

_ROUNDINGS = 64  # roundings by which two means of the same losses may differ, at least
_BATCHES_HELD = 16  # batches of unknown examples between two looks at what was found


def precision(loss: Tensor) -> torch.dtype:
    """Finds the least precise dtype in the graph of a loss: that of the loss, or of a tensor it was computed from."""
    dtypes = {loss.dtype}
    for node in nodes_behind([loss]):
        dtypes.update(t.dtype for t in getattr(node, "_input_metadata", ()) if t.dtype.is_floating_point)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def in_double(evaluation: Evaluation, loss: str, batch: Any) -> tuple[Evaluation, Any]:
    """Returns the evaluation and the batch in float64, if this loss is the same there; else both as they were given."""
    if evaluation.space.pass_dtype == evaluation.space.dtype == torch.float64:
        return evaluation, batch
    twin = evaluation.widened()
    cast = _cast(batch)
    try:
        with torch.no_grad():
            here = float(getattr(evaluation, loss)(evaluation.leaves(), batch).detach())
            there = getattr(twin, loss)(twin.leaves(), cast).detach()
    except Exception:  # a layer, an operator or a constant takes only its own dtype
        return evaluation, batch
    close = torch.finfo(evaluation.space.pass_dtype).eps ** 0.5 * (1 + abs(here))
    same = there.dtype == torch.float64 and abs(float(there) - here) <= close
    return (twin, cast) if same else (evaluation, batch)


def in_one_batch(batches: Batches, count: int = 8) -> tuple[list[int], Any] | None:
    """Picks up to ``count`` examples, and reads them as one batch; None where no two examples can be in one batch.

    They are spread over the data, since neighbours may be of one class; neighbours if those don't fit into one batch.
    """
    if batches.batch_size is None:
        return None
    n, count = batches.n, min(count, max(batches.batch_size, 4), batches.n)
    if count < 2:
        return None
    for some in ([i * (n - 1) // (count - 1) for i in range(count)], list(range(count))):
        try:
            return some, batches.peek(some)
        except Exception:  # a collate_fn may refuse ragged examples; a mistake shows again in the loader's own batches
            continue
    return None


# -- a mean over the batch --------------------------------------------------------------------------------------------
#
# ``loss`` is the name of a loss of Evaluation. A train_loss whose regulariser is known separately is checked without
# it, as "data_loss"; an overridden one as it is, since mean(ℓᵢ + reg) = mean(ℓᵢ) + reg.


def not_a_mean(loss: str, evaluation: Evaluation, batches: Batches) -> str:
    """Says what is wrong with the loss of one batch of up to eight examples, spread over the data; empty if nothing is.

    Where the loss of the batch is not finite, examples whose own loss is not finite are left out. Also notes the
    precision of the loss.
    """
    loss = "data_loss" if loss == "train_loss" and not evaluation.overrides_train_loss else loss
    function, leaves = getattr(evaluation, loss), evaluation.leaves()
    with undisturbed(batches, leaves[0].device):
        some, batch = in_one_batch(batches) or ([0], batches.peek([0]))
        together = function(leaves, batch)
        evaluation.space.saw(precision(together))
        if not together.isfinite():
            with torch.no_grad():
                finite = [i for i in some if function(leaves, batches.peek([i])).isfinite()]
            some = finite if len(finite) < len(some) else some
        return compared(loss, evaluation, batches, some) if len(some) > 1 else ""


def compared(loss: str, evaluation: Evaluation, batches: Batches, some: Sequence[int]) -> str:
    """Says what is wrong with the loss of a batch of these examples; each is read and collated alone as well.

    What seems wrong is checked again in float64, if the model runs in it, so that rounding is not reported.
    """
    batch = batches.peek(some)
    alone = [batches.peek([i]) for i in some]
    if batches.draws(some):  # each reading gives other data: these are cut into examples, if they can be
        if not _is_rows(batch, len(some)):
            return ""
        template, tensors = take_apart(batch, leading=1)
        alone = [put_together(template, [t[j : j + 1] for t in tensors]) for j in range(len(some))]
    finding = _finding(loss, evaluation, batch, alone)
    if not finding:
        return ""
    wide, cast = in_double(evaluation, loss, batch)
    return finding if wide is evaluation else _finding(loss, wide, cast, [_cast(one) for one in alone])


def _finding(loss: str, evaluation: Evaluation, batch: Any, alone: Sequence[Any]) -> str:
    function, leaves, dtype = getattr(evaluation, loss), evaluation.leaves(), evaluation.space.pass_dtype
    with torch.no_grad():
        together, *each, again = (float(function(leaves, some).detach()) for some in (batch, *alone, batch))
    random = math.isfinite(together) and finding_of(loss, again, [together], dtype)  # ``randomness`` says so
    return "" if random else finding_of(loss, together, each, dtype)


def finding_of(loss: str, together: float, alone: Sequence[float], dtype: torch.dtype) -> str:
    """Says what is wrong with the loss of a batch, given those of its examples alone; empty if it is their mean."""
    mean, total = sum(alone) / len(alone), sum(alone)
    close = torch.finfo(dtype).eps ** 0.5 * sum(map(abs, alone))
    if together == mean or (math.isfinite(together) == math.isfinite(mean) and not abs(together - mean) > close):
        return ""
    if abs(together - total) <= close:
        problem = (
            f"what looks like the sum (the loss of {len(alone)} examples equals the sum of their losses); use "
            "reduction='mean', or scores are wrong by a factor of the batch size"
        )
    else:
        problem = (
            f"something else: {together:.6g} for {len(alone)} examples together, and {mean:.6g} for the mean of their "
            "losses one by one. Gradients are those of examples one by one, the curvature is that of batches, so that "
            "scores are wrong. Where class weights (weight=), ignore_index or a count of tokens divides the loss, it "
            "depends on what else is in the batch: divide by a constant, as in "
            "(F.cross_entropy(outputs, y, weight=w, reduction='none') / w[all_labels].mean()).mean(). Where examples "
            "see one another (batch statistics, in-batch negatives), an example alone has another loss than with others"
        )
    name = "train_loss" if loss == "data_loss" else loss
    return f"{name}: expected the mean loss over the batch, got {problem}"


def tell(finding: str) -> None:
    """Warns of a finding, if there is one."""
    if finding:
        warnings.warn(finding, UserWarning, stacklevel=level_of_the_user())


class Means:
    """The comparison, for every batch of a pass over data, of its loss with the mean of its examples' own losses.

    A loss that is divided by what is in the batch (class weights, ignored labels, counts of tokens) differs only in
    batches that hold such examples, and these may be rare: so all batches are compared, each once.

    Cost: a forward pass over the examples as batches of one; ``torch.func.vmap`` does many of them at a time where it
    can. Nothing waits for the device before ``conclude``. Memory: a number for each example, and up to 16 batches.

    Args:
        loss: the name of the loss.
        evaluation, batches: of the model and the data.
        told: whether the user has been warned already; then no more warnings are given.
    """

    def __init__(self, loss: str, evaluation: Evaluation, batches: Batches, told: bool = False) -> None:
        self._loss, self._evaluation, self._batches, self._told = loss, evaluation, batches, told
        self._looked_at: set[int] = set()  # the first examples of batches
        self._drawn = 0
        self._vmaps = True
        self._entries: list[_Entry] = []
        self._ended = batches.batch_size is None  # each example is a batch of its own

    def add(self, batch: Any, size: int, together: Tensor, where: Sequence[int] | None = None) -> None:
        """Adds a batch of ``size`` examples and its loss to the comparison.

        Args:
            batch: as the loss got it.
            size: number of its examples.
            together: its loss.
            where: the examples; a batch that was compared before is skipped. None: they were drawn at random. Then the
                batch is compared if it can be cut into its examples; once as many examples have been drawn as there
                are, or something seems wrong, all data are read.
        """
        if self._ended or size < 2 or (where is not None and where[0] in self._looked_at):
            return
        if where is not None:
            self._looked_at.add(where[0])
        with torch.no_grad():
            alone = self._alone(self._evaluation, batch, size, where)
        if alone is not None:
            self._entries.append(_Entry(together.detach(), alone, where))
        if where is None:
            self._drawn += size
            if self._drawn >= self._batches.n or len(self._entries) == _BATCHES_HELD:
                self.conclude_draws()

    def conclude_draws(self) -> None:
        """Reads all data if as many examples have been drawn as there are, or what was drawn seems wrong."""
        if self._drawn >= self._batches.n or self._suspects():
            self.read_all()

    def read_all(self, conclude: bool = True) -> None:
        """Reads all data in the loader's own batches and compares each. Costs two forward passes."""
        if self._ended:
            return
        self._entries, self._looked_at, start = [], set(), 0
        leaves = self._evaluation.leaves()
        with torch.no_grad(), undisturbed(self._batches, leaves[0].device):
            for batch, size in self._batches.read():
                self.add(batch, size, getattr(self._evaluation, self._loss)(leaves, batch), range(start, start + size))
                start += size
        self._ended = True
        if conclude:
            self.conclude()

    def conclude(self) -> bool:
        """Tells whether all batches so far agreed with their examples. Warns, once, where the loader's own did not."""
        suspects = self._suspects()
        if suspects and not self._told:
            finding = next(filter(None, map(self._confirmed, suspects)), "")
            self._told = bool(finding)
            tell(finding)
        self._ended = self._ended or self._told
        return not suspects

    def _suspects(self) -> list[_Entry]:
        """Returns the batches that seem to differ from their examples; waits for the results, and drops all batches."""
        entries, self._entries = self._entries, []
        if not entries:
            return []
        departures = torch.stack([entry.departure(self._evaluation.space.pass_dtype) for entry in entries]).tolist()
        return [entry for entry, by in zip(entries, departures, strict=True) if not by <= 1]

    def _alone(self, evaluation: Evaluation, batch: Any, size: int, where: Sequence[int] | None) -> Tensor | None:
        """Computes the loss of each example alone [size]; examples are cut from the batch if possible, else read."""
        loss, leaves = getattr(evaluation, self._loss), evaluation.leaves()
        if not _is_rows(batch, size):
            if where is None:
                return None
            return torch.stack([loss(leaves, self._batches.peek([i])) for i in where])
        template, tensors = take_apart(batch, leading=1)
        ones = [t.unsqueeze(1) for t in tensors]
        if self._vmaps:
            try:
                with quiet_vmap():
                    return torch.vmap(lambda parts: loss(leaves, put_together(template, parts)))(ones)
            except Exception:  # what vmap can't do; a mistake of the user has shown in the batch
                self._vmaps = False
        return torch.stack([loss(leaves, put_together(template, [t[j] for t in ones])) for j in range(size)])

    def _confirmed(self, entry: _Entry) -> str:
        """Reads these examples again in the loader's own batches and says what is wrong with one; empty if nothing is.

        It uses float64 if the model runs in it, so that it reports no rounding, no larger batch and no wrong cut.
        """
        assert entry.where is not None  # where examples were drawn, all data are read again
        step, device = self._batches.batch_size or 1, entry.together.device
        for first in range(0, len(entry.where), step):
            some = entry.where[first : first + step]
            if len(some) < 2:
                continue
            with undisturbed(self._batches, device), torch.no_grad():
                where, batch = in_double(self._evaluation, self._loss, self._batches.peek(some))
                together = getattr(where, self._loss)(where.leaves(), batch)
                alone = self._alone(where, batch, len(some), some)
                assert alone is not None  # since the examples are known
                if float(_Entry(together, alone, some).departure(where.space.pass_dtype)) <= 1:
                    continue
                if finding := compared(self._loss, self._evaluation, self._batches, some):
                    return finding
        return ""

    def worst(self) -> list[int]:
        """Returns the examples of the batch that departs most, among the batches added since the last ``conclude``."""
        dtype = self._evaluation.space.pass_dtype
        most = max(self._entries, key=lambda entry: float(entry.departure(dtype)), default=None)
        return [] if most is None else list(most.where or ())


def departs_most(loss: str, evaluation: Evaluation, batches: Batches) -> list[int]:
    """Finds the loader's batch whose loss departs most from the mean of its examples' own, and returns its examples.

    Cost: two forward passes over the data.
    """
    means = Means(loss, evaluation, batches)
    means.read_all(conclude=False)
    return means.worst()


@dataclasses.dataclass(frozen=True)
class _Entry:
    """The losses of a batch that was compared.

    Attributes:
        together: its loss.
        alone: those of its examples [size].
        where: the examples, if they are known.
    """

    together: Tensor
    alone: Tensor
    where: Sequence[int] | None

    def departure(self, dtype: torch.dtype) -> Tensor:
        """Computes |together - mean of alone| in units of what may be rounding; infinite if only one of them is finite.

        A tenth of one example's share in the loss counts as more than rounding, if the dtype can resolve it.
        """
        eps, size = torch.finfo(dtype).eps, len(self.alone)
        allowed = min(eps**0.5, max(0.1 / size, _ROUNDINGS * eps))
        together, alone = self.together.double(), self.alone.double()
        mean = alone.mean()
        apart = (together - mean).abs() / (allowed * torch.maximum(alone.abs().mean(), together.abs()))
        apart = torch.where(together == mean, 0.0, apart)
        one = torch.where(together.isfinite() ^ mean.isfinite(), torch.inf, 0.0)
        return torch.where(together.isfinite() & mean.isfinite(), apart, one)


def _cast(batch: Any) -> Any:
    return map_parts(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, batch)


def _is_rows(batch: Any, size: int) -> bool:
    """Tells whether a batch is only tensors with a row for each of its examples."""
    found = parts(batch)
    plain = (type(t) is Tensor and is_dense(t) and t.dim() > 0 for t in found)
    return bool(found) and all(plain) and all(len(t) == size for t in found)
