"""The user's objective as pure functions of the parameters: the model is called, never changed.

Parameters are handed in as *leaves*: one tensor per selected parameter, shaped like it. While the objective runs, the
model's own tensors are swapped for them (``torch.func.functional_call``, so tied weights stay tied) and buffers for
clones; afterwards the very same Parameter objects, buffers and attributes are back, also after an exception.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_influence import composed
from torch_influence.caller import level_of_the_user
from torch_influence.leaves import copy_of, same, versions
from torch_influence.leaves import leaves as leaves_of
from torch_influence.objective import BaseObjective
from torch_influence.parameters import ParameterSpace

_DEPTH = 5  # from the objective to a list in a module in a list of it
_ROOM = 2000  # containers and objects
_LONGEST = 1000  # items of a container, beyond which it holds data and not settings
_LARGEST_ARRAY = 2**16  # bytes, likewise


class _Host(nn.Module):
    """Owns the model as a child, so that any function of the model can run under functional_call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


class Evaluation:
    """Losses and outputs of a model at given parameters, without side effects on the model.

    Attributes:
        edits: by loss, whether it edits its batches in place; None while that is looked at. Each evaluation of a loss
            that does, or is not known not to, gets a copy of its batch.
        on_open: called when a session opens, not for those inside it: the place to look for what has changed.
    """

    def __init__(self, model: nn.Module, objective: BaseObjective, space: ParameterSpace) -> None:
        self.model = model
        self.objective = objective
        self.space = space
        self._host = _Host(model)
        # torch-influence 0.1.0 passed these by name, so old objectives may have them in any order.
        names = inspect.signature(objective.test_loss).parameters.keys()
        self._test_loss_by_name = {"model", "params", "batch"} <= names
        self._open = False
        self.edits: dict[str, bool | None] = {}
        self.on_open: Callable[[], None] | None = None

    # -- parameters ---------------------------------------------------------------------------------------------

    def leaves(self, row: Tensor | None = None) -> tuple[Tensor, ...]:
        """Fresh leaves that require grad, at the model's parameters or at a row [d]."""
        here = self.space.current()
        if row is None:
            return tuple(p.detach().requires_grad_() for p in here)
        pieces = zip(self.space.split(row.detach()), here, strict=True)
        return tuple(piece.to(p.dtype).requires_grad_() for piece, p in pieces)

    def fingerprint(self) -> tuple[Any, ...]:
        """Changes whenever parameters or buffers do; the checksum sees ``.data`` edits, which bump no version."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        sums: dict[torch.device, list[Tensor]] = {}  # one wait for each device
        for t in tensors:
            sums.setdefault(t.device, []).append(_checksum(t.detach()))
        checksums = [torch.stack(some).tolist() for some in sums.values()]
        return tuple((t.data_ptr(), t._version) for t in tensors), repr(checksums)  # a nan equals itself as text

    def settings(self) -> tuple[Any, ...]:
        """Numbers, texts and tensors that are attributes of the objective and of the model's modules.

        Those of the objective may set its weight decay, say; they are looked for in containers, arrays and plain
        objects, too, some levels deep.
        """
        inside = _Settings()
        return inside.of(self.objective, _DEPTH), tuple(
            (name, inside.of(value, 0))
            for module in self.model.modules()
            for name, value in vars(module).items()
            if name != "training" and not (name.startswith("_") and isinstance(value, dict))
        )

    # -- the objective --------------------------------------------------------------------------------------------

    def train_loss(self, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        """Mean regularised training loss of a batch."""
        batch = self.batch_for("train_loss", batch)
        with self._watching("train_loss", batch):
            loss = self._call(leaves, lambda model, flat: self.objective.train_loss(model, flat, batch))
        return _scalar(loss, "train_loss")

    def data_loss(self, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        """Mean training loss of a batch, without the regulariser."""
        batch = self.batch_for("train_loss", batch)
        return self.train_loss_on_outputs(leaves, self.train_outputs(leaves, batch), batch)

    def test_loss(self, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        """Mean test loss of a batch."""
        batch = self.batch_for("test_loss", batch)

        def run(model: nn.Module, flat: Tensor) -> Any:
            if self._test_loss_by_name:
                return self.objective.test_loss(model=model, params=flat, batch=batch)
            return self.objective.test_loss(model, flat, batch)

        with self._watching("test_loss", batch):
            return _scalar(self._call(leaves, run), "test_loss")

    def train_outputs(self, leaves: Sequence[Tensor], batch: Any) -> Any:
        """Model outputs for a training batch, as ``batch_for`` gives it: both parts of a loss get the same."""
        with self._watching("train_loss", batch):
            return self._call(leaves, lambda model, flat: self.objective.train_outputs(model, batch))

    def train_loss_on_outputs(self, leaves: Sequence[Tensor], outputs: Any, batch: Any) -> Tensor:
        """Mean loss of these outputs, without the regulariser; of the batch that the outputs were made of."""
        with self._watching("train_loss", batch):
            loss = self._call(leaves, lambda model, flat: self.objective.train_loss_on_outputs(outputs, batch))
        return _scalar(loss, "train_loss_on_outputs")

    def train_regularization(self, leaves: Sequence[Tensor]) -> Tensor | float:
        """The regulariser at these parameters."""
        return self._call(leaves, lambda model, flat: self.objective.train_regularization(flat))

    def _call(self, leaves: Sequence[Tensor], function: Callable[[nn.Module, Tensor], Any]) -> Any:
        space = self.space
        tensors = dict(zip(space.names, leaves, strict=True))
        for name, p in zip(space.trainable, space.current(space.trainable), strict=True):
            tensors.setdefault(name, p.detach())
        flat = torch.cat([tensors[name].reshape(-1).to(space.dtype) for name in space.trainable])
        state = {f"model.{name}": t for name, t in tensors.items()}
        state.update((f"model.{name}", b.clone()) for name, b in self.model.named_buffers())
        with self.session():
            return functional_call(self._host, state, (function, flat), tie_weights=True)

    @property
    def overrides_train_loss(self) -> bool:
        """Whether the user's train_loss is something else than the sum of its parts."""
        return type(self.objective).train_loss is not BaseObjective.train_loss

    @property
    def is_open(self) -> bool:
        """Whether a session is open."""
        return self._open

    # -- batches that the objective edits ---------------------------------------------------------------------------

    def batch_for(self, loss: str, batch: Any) -> Any:
        """What to evaluate a loss on: a copy of the batch, unless the loss leaves batches as they are."""
        return copy_of(batch) if self.edits.get(loss, True) else batch

    def examine(self, loss: str, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        """A loss of a copy of this batch, which tells whether it edits its batches."""
        copy, known = copy_of(batch), self.edits.pop(loss, None)
        edited = known
        self.edits[loss] = None
        try:
            value: Tensor = getattr(self, loss)(leaves, copy)
            edited = bool(known or self.edits[loss]) or not same(copy, batch)
        finally:
            del self.edits[loss]
            if edited is not None:  # else an exception has ended it, and nothing is known
                self.edits[loss] = edited
        return value

    def distrust(self) -> None:
        """Gives copies from now on, and says so: a batch was edited by a loss that had left others as they were."""
        self.edits = {"train_loss": True, "test_loss": True}
        warnings.warn(
            "objective: it, or the model, edits some batches in place, and not the first one (x.sub_(1), x[mask] = 0). "
            "Each evaluation gets a copy from now on. A batch that shares memory with the data set (a collate_fn that "
            "hands out the data set's own tensors) was edited there: write x = x - 1, or x = x.clone() first",
            UserWarning,
            stacklevel=level_of_the_user(),
        )

    @contextlib.contextmanager
    def _watching(self, loss: str, batch: Any) -> Iterator[None]:
        """Takes note if the batch is edited meanwhile. Inside vmap no edit is seen."""
        before = leaves_of(batch)
        counts = versions(before)
        yield
        after = leaves_of(batch)
        if counts == versions(before) and len(before) == len(after) and all(map(operator.is_, before, after)):
            return
        if self.edits.get(loss, True) is False:
            self.distrust()
        else:
            self.edits[loss] = True

    # -- surroundings -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Eval mode and operators that can be differentiated twice; all as it was when the block ends, however it ends.

        Modules that the objective holds (a frozen backbone, a teacher) are treated as the model is.
        cuDNN may use TF32 inside only where matrix products may, see ``_precise_convolutions``. Public calls open it
        once around all their work; nested ones cost nothing.
        """
        if self._open:
            yield
            return
        networks = [m for m in (self.model, self.objective, *vars(self.objective).values()) if isinstance(m, nn.Module)]
        with contextlib.ExitStack() as stack:
            for network in networks:
                stack.callback(_remember_modules(network))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_precise_convolutions())
            for flag in _twice_differentiable([m for network in networks for m in network.modules()]):
                stack.enter_context(flag)
            for network in networks:
                network.eval()
            self._open = True
            stack.callback(setattr, self, "_open", False)
            if self.on_open is not None:
                self.on_open()
            yield


def _scalar(loss: Any, name: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name}: expected a scalar tensor (the mean loss over the batch), got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"{name}: expected a scalar (the mean loss over the batch), got shape {tuple(loss.shape)}; "
            "reduce it with .mean()"
        )
    return loss.reshape(())


def _remember_modules(model: nn.Module) -> Callable[[], None]:
    """Takes note of train/eval modes and of tensors kept as plain attributes; returns what puts them back.

    Plain attributes: the flat weights of an LSTM, the weight that old-style weight_norm computes, activations that a
    forward leaves behind. functional_call knows nothing of them, and left alone they would hold a graph of ours.
    """
    modes = [(m, m.training) for m in model.modules()]
    loose = [(m, _loose(m)) for m in model.modules()]
    contents = [(value, list(value)) for _, kept in loose for value in kept.values() if isinstance(value, list)]

    def restore() -> None:
        for m, mode in modes:
            m.training = mode
        for m, kept in loose:
            for key in _loose(m).keys() - kept.keys():
                del vars(m)[key]
            vars(m).update(kept)
        for value, items in contents:
            value[:] = items

    return restore


def _checksum(t: Tensor) -> Tensor:
    """A sum with another factor for every place, so that it tells permutations too; float64, without a copy of t."""
    flat = (torch.view_as_real(t) if t.is_complex() else t).reshape(-1)
    width = 4096
    whole = flat[: len(flat) // width * width].view(-1, width)
    rest = flat[whole.numel() :].to(torch.float64)
    across, down = (
        torch.arange(1, size + 1, dtype=torch.float64, device=t.device).sqrt() for size in (width, len(whole))
    )
    by_column, by_row = whole.sum(0, dtype=torch.float64), whole.sum(1, dtype=torch.float64)
    return by_column @ across + by_row @ down + rest @ across[: len(rest)]


class _Settings:
    """What values come to, for comparison with later: plain ones themselves, others their contents, down to a depth.

    Attributes:
        room: how many more containers and objects are looked into; the rest is told apart by identity.
    """

    def __init__(self) -> None:
        self.room = _ROOM

    def of(self, value: Any, depth: int) -> Any:
        """Equal to what it was as long as nothing that is seen of the value has changed."""
        if isinstance(value, Tensor):
            return id(value), value._version
        if value is None or isinstance(value, int | float | str):
            return value
        if isinstance(value, np.ndarray) and value.nbytes <= _LARGEST_ARRAY and not value.dtype.hasobject:
            return id(value), value.tobytes()
        inside = _inside(value) if depth and self.room > 0 else None
        if inside is None:
            return id(value)
        self.room -= 1
        return id(value), tuple((key, self.of(item, depth - 1)) for key, item in inside)


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


def _loose(module: nn.Module) -> dict[str, Tensor | list[Any]]:
    return {key: value for key, value in vars(module).items() if isinstance(value, Tensor | list)}


def _twice_differentiable(modules: Sequence[nn.Module]) -> list[contextlib.AbstractContextManager[Any]]:
    """Switches off what has no second derivative.

    Fused attention, MHA's inference path, cuDNN and oneDNN RNNs, and code that torch.compile has compiled.
    """
    flags: list[contextlib.AbstractContextManager[Any]] = [sdpa_kernel(SDPBackend.MATH), _mha_fastpath_off()]
    if composed.wanted(modules):
        flags.append(composed.Composed())
    if any(isinstance(m, nn.RNNBase) for m in modules):  # only then: without cuDNN convolutions are slow
        flags += [_off(torch.backends.cudnn), _off(torch.backends.mkldnn)]
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
        flags.append(torch.compiler.set_stance("force_eager"))
    return flags


@contextlib.contextmanager
def _off(backend: Any) -> Iterator[None]:
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before


@contextlib.contextmanager
def _precise_convolutions() -> Iterator[None]:
    """Convolutions and RNNs in the float32 that they are given, as matrix products are, unless the user says otherwise.

    torch lets cuDNN round their operands to TF32, a relative 5e-4, by default: more than the tolerance of a solve, and
    than fast paths may differ from plain ones by. Who allows TF32 in matrix products
    (``torch.set_float32_matmul_precision("high")``) or everywhere (``torch.backends.fp32_precision = "tf32"``), or has
    set cuDNN's to anything else than torch's default, keeps that. The older of torch's two switches is used: with the
    newer one, reading the older (``torch.backends.cudnn.flags`` in somebody's forward) is an error.
    """
    cudnn: Any = torch.backends.cudnn
    untouched = (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.fp32_precision) == ("tf32", "tf32", "none")
    if not untouched or torch.backends.cuda.matmul.fp32_precision == "tf32":
        yield
        return
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = True


@contextlib.contextmanager
def _mha_fastpath_off() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
