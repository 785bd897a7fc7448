"""Whether the model, the objective or the data have changed since what is kept was computed: one look in a public call.

Parameters and buffers are seen by their checksums. The rest is seen by what it does: the losses of a few examples and
their gradients are computed in each public call, and compared with those from the time when the version began. That
sees whatever the objective reads, wherever it is: a notebook's global, a closure, the model's config, a hook. A walk
over attributes gives a hint, for what the few examples don't feel: then all losses are compared.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from torch_influence.batches import Batches, copy_of, held, versions
from torch_influence.caller import level_of_the_user
from torch_influence.evaluation import Evaluation
from torch_influence.gradients import undisturbed

_EXAMPLES = 4  # of each data set, spread over it
_ROUNDINGS = 32  # by which two computations of the same may differ where the device adds in any order
_OF_NOISE = 8  # times the noise is a change: two draws of noise may be near one another, and a third one far
_SEED = 0  # of what a loss draws from the default generators: the same in each probe, so that it is no noise

_WIDTH = 4096  # of the rows in which numbers are summed

_DEPTH = 5  # from the objective to a list in a module in a list of it
_ROOM = 2000  # containers and objects
_LONGEST = 1000  # items of a container, beyond which it holds data and not settings
_LARGEST_ARRAY = 2**16  # bytes, likewise
_TORCHS_OWN = frozenset(vars(nn.Module()))  # every module has these attributes: hooks, children, parameters, its mode

_NAMES = "<names>"  # of what something holds: no name of an attribute, nor of a key as it is noted

Path: TypeAlias = tuple[Any, ...]  # to an attribute: names and places
Settings: TypeAlias = dict[Path, Any]
Source: TypeAlias = tuple[str, Batches]  # the name of a loss of Evaluation, and the data that it is of


class Watch:
    """Moves its ``version`` when anything that results depend on has changed, but for the values of the data.

    Its owner calls, for each outermost session: ``open`` before the model is put into eval mode (layers that merge
    weights then may put them elsewhere), ``look`` when it is, and ``close`` when all is as it was before. What was made
    at another ``version`` is no longer valid.

    Edits of data are left to ``Batches.refresh``; their ``generation`` is looked at here, so that the examples are
    those of the data as they are.

    Not seen is an edit that no attribute shows and that touches nothing but examples outside the probe.

    Cost: a checksum of the parameters, and a forward and a backward pass over each of up to 4 examples for each source;
    nothing while it is ``frozen``. Memory: these examples, on the device.

    Attributes:
        version: moves with every change, and where it is not known whether there was one. It moves before anything else
            does, so that an interrupted look leaves nothing that is taken for new.
        fingerprint: of the parameters and buffers, when they were last looked at.
        changes: how many changes of what the losses are were seen, those of parameters and buffers not counted, nor
            any between ``drop`` and the next look.
        told: whether the user has been told that the losses are random.
    """

    def __init__(self) -> None:
        self.version = 0
        self.fingerprint: tuple[Any, ...] = ()
        self.changes = 0
        self.told = False
        self._frozen: set[object] = set()
        self.drop()

    def drop(self) -> None:
        """Forgets all that is known: the version moves."""
        self.version += 1
        self._base: _Base | None = None  # from when the version began
        self._counters: set[Path] = set()  # attributes that our own calls move
        self._opened: Settings | None = None  # when the session opened
        self._closed: Settings | None = None  # when the last one closed
        self._hinted = False  # whether others than our own calls have moved an attribute, and nothing came of it yet
        self._noise = 0.0  # the most that two probes of the same have differed by

    def start_anew(self) -> None:
        """Forgets all that is known: something else is watched from now on."""
        self.told = False
        self.changes += 1
        self.drop()

    def __getstate__(self) -> dict[str, Any]:
        """Without the examples and what is known; drops them here, too."""
        self.drop()
        return {**vars(self), "_frozen": set()}

    # -- for who must not be looked at --------------------------------------------------------------------------------

    @property
    def is_frozen(self) -> bool:
        """Whether nothing is looked at."""
        return bool(self._frozen)

    def freeze(self, holder: object) -> None:
        """Looks at nothing until ``thaw`` is called for this holder, and for all others."""
        self._frozen.add(holder)

    def thaw(self, holder: object) -> None:
        """Ends what ``freeze`` began."""
        self._frozen.discard(holder)

    # -- in each outermost session ------------------------------------------------------------------------------------

    def open(self, evaluation: Evaluation) -> None:
        """Looks at parameters and attributes, before the model is put into eval mode."""
        if self._frozen:
            return
        self.fingerprint, opened = fingerprint(evaluation), settings(evaluation)
        if self._closed is not None and not all(map(self._is_counter, _moved(self._closed, opened))):
            self._hinted = True
        self._opened = opened

    def look(self, evaluation: Evaluation, sources: Sequence[Source], losses_hold: Callable[[], bool | None]) -> None:
        """Moves the version if something has changed. In eval mode.

        Args:
            evaluation: of the model and the objective.
            sources: the losses and the data of which there are results that are kept.
            losses_hold: tells whether all training losses are what they were; None where that is not known. It costs a
                forward pass over the data.
        """
        if self._frozen or self._opened is None:
            return
        base = self._base
        generations = tuple((loss, batches.generation) for loss, batches in sources)
        known = base is not None and base.generations == generations
        if base is not None and known and base.fingerprint == self.fingerprint:
            holds = self._holds(base, losses_hold)
            if holds:
                self._hinted = False
                return
            self.changes += holds is False
        self.version += 1
        self._base = None
        probe = base.probe if base is not None and known else _Probe(evaluation, sources)
        self._noise, self._hinted = 0.0, False
        self._base = _Base(self.fingerprint, generations, probe, probe.measured())

    def close(self, evaluation: Evaluation) -> None:
        """Notes which attributes our own calls have moved, after all is as it was before the session."""
        opened, self._opened = self._opened, None
        if opened is not None:
            self._closed = settings(evaluation)
            self._counters |= _moved(opened, self._closed)

    # -- private ------------------------------------------------------------------------------------------------------

    def _holds(self, base: _Base, losses_hold: Callable[[], bool | None]) -> bool | None:
        """Tells whether the losses are what they were; None where that is not known."""
        now = base.probe.measured()
        apart = base.measured.departure(now)
        if apart > max(1.0, _OF_NOISE * self._noise):
            again = base.probe.measured(), base.probe.measured()
            noise = max(one.departure(other) for one, other in ((now, again[0]), (now, again[1]), again))
            if apart > max(1.0, _OF_NOISE * noise):
                return False
            self._noise = max(self._noise, noise)
            self._tell_of_noise()
        return losses_hold() if self._hinted else True

    def _is_counter(self, path: Path) -> bool:
        """Whether our own calls move this attribute, or one that it is in."""
        return any(path[:end] in self._counters for end in range(1, len(path) + 1))

    def _tell_of_noise(self) -> None:
        if self.told:
            return
        self.told = True
        warnings.warn(
            "objective: the losses or gradients of the same examples are others each time that they are computed, by "
            f"about {self._noise:.2g} times what rounding explains. Changes of the model, of the objective or of what "
            "they read are noticed only where they are larger: call clear_cache() after such a change",
            UserWarning,
            stacklevel=level_of_the_user(),
        )


# -- the probe --------------------------------------------------------------------------------------------------------


class _Base(NamedTuple):
    """The state of things when the version began."""

    fingerprint: tuple[Any, ...]
    generations: tuple[Any, ...]
    probe: _Probe
    measured: _Measured


@dataclasses.dataclass(frozen=True)
class _Measured:
    """The results of a probe.

    Attributes:
        values: losses, products of gradients with a row, regularisers; NaN where they could not be computed.
        sizes: the sums of magnitudes that they are made of.
        eps: of the dtype that they were computed in.
    """

    values: Sequence[float]
    sizes: Sequence[float]
    eps: float

    def departure(self, other: _Measured) -> float:
        """The largest difference, in units of what may be rounding; infinite where only one of two is finite."""
        return max(
            (
                _apart(a, b, _ROUNDINGS * max(self.eps, other.eps) * max(one, two))
                for a, b, one, two in zip(self.values, other.values, self.sizes, other.sizes, strict=True)
            ),
            default=0.0,
        )


def _apart(a: float, b: float, allowed: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / allowed if allowed > 0 else math.inf


class _Probe:
    """A few examples of each source, collated once, and what the losses make of them, by the plain way alone.

    What can't be read, collated or computed is left out: it shows where it belongs, when it is wanted in earnest.
    Memory: the examples, and the graph of one of them.
    """

    def __init__(self, evaluation: Evaluation, sources: Sequence[Source]) -> None:
        self._evaluation = evaluation
        self._some = [(loss, _collated(batches)) for loss, batches in sources]
        self._quietly = sources[0][1] if sources else None

    def measured(self) -> _Measured:
        """Losses, gradients times a row and regularisers. Leaves random states as they were, from where it draws."""
        evaluation = self._evaluation
        if self._quietly is None:
            return _Measured((), (), 0.0)
        leaves = evaluation.leaves()
        device = leaves[0].device
        values: list[Tensor | float] = []
        slopes: list[Tensor] = []

        def take(loss: Tensor | None, regularizer: Tensor | float | None) -> None:
            for value in (loss, regularizer):
                values.append(value.detach() if isinstance(value, Tensor) else math.nan if value is None else value)
            slopes.extend(self._slope(loss, regularizer, leaves))

        with undisturbed(self._quietly, device, _SEED):
            for loss, examples in self._some:
                evaluation.each_loss(loss, leaves, examples, take)
        tensors = [t.to(torch.float64) for t in (*values, *slopes) if isinstance(t, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else ())  # one wait
        plain = [next(numbers) if isinstance(value, Tensor) else value for value in values]
        rest = list(numbers)
        return _Measured(
            [*plain, *rest[::2]], [*map(abs, plain), *rest[1::2]], torch.finfo(evaluation.space.pass_dtype).eps
        )

    def _slope(
        self, loss: Tensor | None, regularizer: Tensor | float | None, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The gradient times a row, and the magnitudes that it is the sum of, about; NaN where there is none."""
        unknown = torch.full((), math.nan, dtype=torch.float64, device=leaves[0].device)
        if loss is None:
            return unknown, unknown
        total = loss if regularizer is None else loss + regularizer
        if not total.requires_grad:
            return torch.zeros_like(unknown), torch.zeros_like(unknown)
        try:
            found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
            flat = self._evaluation.space.flatten(found)
        except Exception:  # an operator without a derivative
            return unknown, unknown
        return checksum(flat), torch.linalg.vector_norm(flat, 1, dtype=torch.float64) * largest_factor(len(flat))


def _collated(batches: Batches) -> list[Any]:
    """A few examples, spread over the data, each as a batch of one; those of a collate_fn that wants more, as one."""
    n, count = batches.n, min(_EXAMPLES, batches.n)
    some = sorted({i * (n - 1) // max(count - 1, 1) for i in range(count)})
    alone = [batch for i in some for batch in _read(batches, [i])]
    if alone or batches.batch_size is None:
        return alone
    return _read(batches, some) or _read(batches, range(count))


def _read(batches: Batches, some: Sequence[int]) -> list[Any]:
    """One batch, or none; a copy, which neither holds on to data that are kept nor is edited with them."""
    try:
        return [copy_of(batches.peek(some))]
    except Exception:  # whatever a data set or a collate_fn says
        return []


# -- parameters and buffers -------------------------------------------------------------------------------------------


def fingerprint(evaluation: Evaluation) -> tuple[Any, ...]:
    """Changes whenever parameters or buffers do; the checksum sees ``.data`` edits, which bump no version."""
    places: list[tuple[int, ...]] = []
    sums: dict[torch.device, list[Tensor]] = {}  # one wait for each device
    model = evaluation.model
    with evaluation.alone():
        for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, whole in tensors:
                for t in _dense_parts(whole.detach(), f"{kind} {name!r}"):
                    sums.setdefault(t.device, []).append(checksum(t))
                    places.append((0 if whole.is_quantized else t.data_ptr(), *versions([whole])))
        checksums = [torch.stack(some).tolist() for some in sums.values()]
    return tuple(places), repr(checksums)  # a nan equals itself as text


def _dense_parts(t: Tensor, name: str) -> Sequence[Tensor]:
    """Returns what a tensor is stored in: itself, or the tensors that make up a sparse, nested or quantized one."""
    parts = [t.int_repr()] if t.is_quantized else held(t)
    if not parts:
        raise TypeError(
            f"model: expected parameters and buffers that are strided, sparse, nested or quantized, got {name} with "
            f"layout {t.layout}; convert it with .to_dense()"
        )
    return parts


def checksum(t: Tensor) -> Tensor:
    """A sum with another factor for every place, so that it tells permutations too; float64, without a copy of t."""
    flat = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).reshape(-1)
    width = _WIDTH
    if len(flat) < width:
        return flat.to(torch.float64) @ _factors(len(flat), t.device)
    whole = flat[: len(flat) // width * width].view(-1, width)
    rest = flat[whole.numel() :].to(torch.float64)
    across, down = _factors(width, t.device), _factors(len(whole), t.device)
    by_column, by_row = whole.sum(0, dtype=torch.float64), whole.sum(1, dtype=torch.float64)
    return by_column @ across + by_row @ down + rest @ across[: len(rest)]


def largest_factor(size: int) -> float:
    """The largest factor in a checksum of so many numbers, or a little more."""
    return math.sqrt(min(size, _WIDTH)) + (math.sqrt(size // _WIDTH) if size >= _WIDTH else 0.0)


def _factors(size: int, device: torch.device) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64, device=device).sqrt()


# -- attributes -------------------------------------------------------------------------------------------------------


def settings(evaluation: Evaluation) -> Settings:
    """Numbers, texts and tensors that are attributes of the objective and of the model's modules, by their paths.

    Those of the objective may set its weight decay, say; they are looked for in containers, arrays and plain objects,
    too, some levels deep.
    """
    found: Settings = {}
    room = _look(("objective",), evaluation.objective, _DEPTH, _ROOM, found)
    for number, module in enumerate(evaluation.model.modules()):
        own = [(name, value) for name, value in vars(module).items() if name not in _TORCHS_OWN]
        found[(number, _NAMES)] = tuple(name for name, _ in own)
        for name, value in own:
            room = _look((number, name), value, 0, room, found)
    return found


def _look(path: Path, value: Any, depth: int, room: int, found: Settings) -> int:
    """Notes what is equal for as long as nothing that is seen of the value has changed; returns the room that is left.

    Plain values are noted as they are, others by identity, and what they hold below them, down to a depth; their names
    or number have a path of their own, so that a counter that is new there makes no counters of those beside it.
    """
    if isinstance(value, Tensor):
        found[path] = id(value), *versions([value])
        return room
    if value is None or isinstance(value, int | float | str):
        found[path] = value
        return room
    if isinstance(value, np.ndarray) and value.nbytes <= _LARGEST_ARRAY and not value.dtype.hasobject:
        found[path] = id(value), value.tobytes()
        return room
    inside = list(_inside(value) or ()) if depth and room > 0 else None
    if inside is None:
        found[path] = id(value)
        return room
    found[path] = id(value)
    names = (*path, _NAMES)
    found[names] = tuple(name for name, _ in inside)
    room -= 1
    for name, item in inside:
        room = _look((*path, name), item, depth - 1, room, found)
    return room


def _inside(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """Names or places, and what is there; None where nothing should be looked for."""
    if isinstance(value, list | tuple | set | frozenset | dict) and len(value) > _LONGEST:
        return None
    if isinstance(value, dict):
        return [(repr(key) if isinstance(key, int | float | str) else id(key), item) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(enumerate(value))
    if isinstance(value, type | ModuleType | FunctionType | MethodType) or not hasattr(value, "__dict__"):
        return None
    return [(name, item) for name, item in vars(value).items() if name != "training"]


def _moved(before: Settings, after: Settings) -> set[Path]:
    """The attributes that are others now. What came or went shows in the names of what is there."""
    return {path for path, value in before.items() if path in after and not _same(value, after[path])}


def _same(one: Any, other: Any) -> bool:
    return one is other or bool(one == other)
