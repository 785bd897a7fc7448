"""The user's objective as pure functions of the parameters: the model is called, never changed.

Parameters are handed in as *leaves*: one tensor per selected parameter, shaped like it. While the objective runs, the
model's own tensors are swapped for them (``torch.func.functional_call``; tied weights stay tied) and buffers for
clones; afterwards the very same Parameter objects, buffers and attributes are back, also after an exception.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_influence import products, switches
from torch_influence.batches import copy_of, parts, same, versions
from torch_influence.caller import level_of_the_user
from torch_influence.evaluation import _composed as composed
from torch_influence.evaluation._remembered import Remembered
from torch_influence.objective import BaseObjective, checked_loss, checked_outputs, checked_regularization
from torch_influence.parameters import ParameterSpace
from torch_influence.torch_errors import explained
from torch_influence.turns import alone_with

_Value = TypeVar("_Value")

_LONGEST = 1000  # items of a container, beyond which it holds data and no networks


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
    """

    def __init__(self, model: nn.Module, objective: BaseObjective, space: ParameterSpace) -> None:
        self.model = model
        self.objective = objective
        self.space = space
        self._host = _Host(model)
        # torch-influence 0.1.0 passed these by name, so old objectives may have them in any order.
        names = inspect.signature(objective.test_loss).parameters.keys()
        self._test_loss_by_name = {"model", "params", "batch"} <= names
        self._wide = False
        self._narrow: torch.dtype | None = None
        self._main = self  # of twins: they are in its sessions
        self.edits: dict[str, bool | None] = {}
        self._opened_by: int | None = None  # a thread

    def widened(self) -> Evaluation:
        """Returns the same losses in float64, in the present session: parameters and buffers are cast when used.

        Batches are the caller's to cast. A model may refuse (a layer that insists on its dtype): then it raises.
        """
        twin = copy.copy(self)
        twin.space = self.space.widened()
        twin._wide = True
        return twin

    def narrowed(self, dtype: torch.dtype) -> Evaluation:
        """Returns the same losses under autocast to this dtype: matrix products and convolutions are rounded to it."""
        twin = copy.copy(self)
        twin.space = self.space.narrowed(dtype)
        twin._narrow = dtype
        return twin

    def by_the_smallest(self, most: int) -> Evaluation:
        """Returns the same losses, differentiated by parameters of at most this many scalars, see ParameterSpace."""
        twin = copy.copy(self)
        twin.space = self.space.smallest(most)
        return twin

    # -- parameters ---------------------------------------------------------------------------------------------

    def leaves(self, row: Tensor | None = None) -> tuple[Tensor, ...]:
        """Fresh leaves that require grad, at the model's parameters or at a row [d]."""
        here = self.space.current()
        if row is None:
            return tuple(self._cast(p.detach()).requires_grad_() for p in here)
        pieces = zip(self.space.split(row.detach()), here, strict=True)
        return tuple(piece.to(p.dtype).requires_grad_() for piece, p in pieces)

    # -- the objective --------------------------------------------------------------------------------------------

    def train_loss(self, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        """Mean regularised training loss of a batch."""
        batch = self.batch_for("train_loss", batch)
        with self._watching("train_loss", batch):
            loss = self._call(leaves, lambda model, flat: self._loss("train_loss", model, flat, batch))
        return checked_loss(loss, "train_loss")

    def data_loss(self, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        """Mean training loss of a batch, without the regulariser."""
        batch = self.batch_for("train_loss", batch)
        return self.train_loss_on_outputs(leaves, self.train_outputs(leaves, batch), batch)

    def test_loss(self, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        """Mean test loss of a batch."""
        batch = self.batch_for("test_loss", batch)
        with self._watching("test_loss", batch):
            loss = self._call(leaves, lambda model, flat: self._loss("test_loss", model, flat, batch))
        return checked_loss(loss, "test_loss")

    def train_outputs(self, leaves: Sequence[Tensor], batch: Any) -> Any:
        """Model outputs for a training batch, as ``batch_for`` gives it: both parts of a loss get the same."""
        with self._watching("train_loss", batch):
            return checked_outputs(self._call(leaves, lambda model, flat: self.objective.train_outputs(model, batch)))

    def train_loss_on_outputs(self, leaves: Sequence[Tensor], outputs: Any, batch: Any) -> Tensor:
        """Mean loss of these outputs, without the regulariser; of the batch that the outputs were made of."""
        with self._watching("train_loss", batch):
            loss = self._call(leaves, lambda model, flat: self.objective.train_loss_on_outputs(outputs, batch))
        return checked_loss(loss, "train_loss_on_outputs")

    def train_regularization(self, leaves: Sequence[Tensor]) -> Tensor | float:
        """The regulariser at these parameters."""

        def at(leaves: Sequence[Tensor]) -> Tensor | float:
            value = self._call(leaves, lambda model, flat: self.objective.train_regularization(flat))
            return checked_regularization(value)

        value = at(leaves)
        if isinstance(value, Tensor) and not value.isfinite():
            raise ValueError(f"train_regularization: expected a finite number, got {float(value.detach())}")
        constant = not isinstance(value, Tensor) or not value.requires_grad
        if constant and value and float(at([1.5 * leaf.detach() for leaf in leaves])) != float(value):
            raise ValueError(
                "train_regularization: its value depends on the parameters, but has no graph; leave out .item(), "
                ".detach() and float(), and use torch's functions"
            )
        return value

    def each_loss(self, loss: str, leaves: Sequence[Tensor], batches: Sequence[Any], use: Callable[..., None]) -> None:
        """Calls ``use(loss, regularizer)`` for each batch, one after the other, all in one call: that takes most time.

        Batches are copied. The regulariser comes with the first batch of "data_loss", else it is None. None is also
        what ends with an error, twice: it can't be had. An error that doesn't come again is raised.
        """

        def losses(model: nn.Module, flat: Tensor) -> None:
            def regularizer() -> Tensor | float:
                return checked_regularization(self.objective.train_regularization(flat))

            def loss_of(batch: Any) -> Tensor:
                return checked_loss(self._loss(loss, model, flat, copy_of(batch)), loss)

            extra = _or_none(regularizer) if loss == "data_loss" else None
            for batch in batches:
                use(_or_none(functools.partial(loss_of, batch)), extra)
                extra = None

        self._call(leaves, losses)

    def _loss(self, loss: str, model: nn.Module, flat: Tensor, batch: Any) -> Any:
        """Asks the objective, of the model as it stands."""
        objective = self.objective
        if loss == "data_loss":
            return objective.train_loss_on_outputs(checked_outputs(objective.train_outputs(model, batch)), batch)
        if loss == "train_loss":
            return objective.train_loss(model, flat, batch)
        if self._test_loss_by_name:
            return objective.test_loss(model=model, params=flat, batch=batch)
        return objective.test_loss(model, flat, batch)

    def _call(self, leaves: Sequence[Tensor], function: Callable[[nn.Module, Tensor], Any]) -> Any:
        space = self.space
        tensors = dict(zip(space.names, leaves, strict=True))
        with self.session():
            for name, p in zip(space.trainable, space.current(space.trainable), strict=True):
                tensors.setdefault(name, self._cast(p.detach()))
            flat = torch.cat([tensors[name].reshape(-1).to(space.dtype) for name in space.trainable])
            own = dict(self.model.named_parameters())
            instead = {id(own[name]): t for name, t in tensors.items()}
            instead |= {id(b): self._cast(b.clone()) for b in self.model.buffers()}
            if self._wide:
                instead |= {id(p): self._cast(p.detach()) for p in own.values() if id(p) not in instead}
            state = {f"model.{name}": instead[id(t)] for name, t in _places(self.model) if id(t) in instead}
            kind = space.current()[0].device.type
            with contextlib.nullcontext() if self._narrow is None else torch.autocast(kind, self._narrow):
                return functional_call(self._host, state, (function, flat), tie_weights=False)

    def _cast(self, t: Tensor) -> Tensor:
        return t.double() if self._wide and t.is_floating_point() else t

    @property
    def overrides_train_loss(self) -> bool:
        """Whether the user's train_loss is something else than the sum of its parts."""
        return type(self.objective).train_loss is not BaseObjective.train_loss

    @property
    def is_open(self) -> bool:
        """Whether this thread has a session open."""
        return self._main._opened_by == threading.get_ident()

    # -- batches that the objective edits ---------------------------------------------------------------------------

    def batch_for(self, loss: str, batch: Any) -> Any:
        """Returns what a loss is evaluated on: a copy of the batch, unless the loss leaves batches as they are."""
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
        before = parts(batch)
        counts = versions(before)
        yield
        after = parts(batch)
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
        cuDNN may use TF32 inside only where matrix products may, see ``switches.py``; on the CPU oneDNN may multiply,
        see ``products.py``. Public calls open it once around
        all their work; nested ones cost nothing. Threads whose models share a module take turns.
        """
        if self.is_open:
            yield
            return
        with self.opened(), self.in_eval_mode():
            yield

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The first half of a session: this thread alone, autograd as it should be, the model's mode as it is."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(explained())
            stack.enter_context(self.alone())
            stack.enter_context(switches.without_autocast([p.device.type for p in self.space.current()]))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            yield

    @contextlib.contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """The second half of a session: losses can be evaluated."""
        with contextlib.ExitStack() as stack:
            networks = self._networks()
            remembered = Remembered(networks, self.objective)
            stack.callback(remembered.put_back)
            for switch in _twice_differentiable([m for network in networks for m in network.modules()]):
                stack.enter_context(switch)
            large = self.space.size >= products.LEAST_SIZE
            if large and self.space.dtype == torch.float32 and all(p.is_cpu for p in self.space.current()):
                stack.enter_context(switches.quick_products())
            self._main._opened_by = threading.get_ident()
            stack.callback(setattr, self._main, "_opened_by", None)
            remembered.to_eval_mode()
            _check_names(self.model, self.space)
            remembered.without_inference_tensors()
            yield

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """No other thread has a session with any of these modules meanwhile; without a change of anything."""
        return alone_with(*(m for network in self._networks() for m in network.modules()))

    def _networks(self) -> list[nn.Module]:
        """The model, and those that the objective is or holds."""
        held = list(vars(self.objective).values())
        for value in list(held):
            if isinstance(value, list | tuple | dict) and len(value) <= _LONGEST:
                held += value.values() if isinstance(value, dict) else value
        found = [m for m in (self.model, self.objective, *held) if isinstance(m, nn.Module)]
        return list({id(m): m for m in found}.values())


def _or_none(compute: Callable[[], _Value]) -> _Value | None:
    """The value, or None where computing it ends with an error each time."""
    try:
        return compute()
    except Exception:
        try:
            compute()
        except Exception:
            return None
        raise


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All places of parameters and buffers, each once: of a tied weight several, of a layer with two names one.

    functional_call's own ``tie_weights`` takes a layer's second name for another place, and leaves what it put there.
    """
    for prefix, m in model.named_modules():
        for name, t in (*m._parameters.items(), *m._buffers.items()):
            if t is not None:
                yield f"{prefix}.{name}" if prefix else name, t


def _check_names(model: nn.Module, space: ParameterSpace) -> None:
    missing = set(space.trainable) - {name for name, _ in model.named_parameters()}
    if missing:
        raise ValueError(
            f"model: expected its trainable parameters in eval mode, too, got none named {', '.join(sorted(missing))}; "
            "where a layer replaces them in eval(), call model.eval() before the module is made"
        )


def _twice_differentiable(modules: Sequence[nn.Module]) -> list[contextlib.AbstractContextManager[Any]]:
    """Switches off what has no second derivative.

    Fused attention, MHA's inference path, cuDNN and oneDNN RNNs, and code that torch.compile has compiled.
    """
    flags: list[contextlib.AbstractContextManager[Any]] = [
        switches.precise_convolutions(),
        switches.fused_attention_off(),
        switches.mha_fastpath_off(),
    ]
    if any(isinstance(m, nn.RNNBase) for m in modules):  # only then: without cuDNN convolutions are slow
        flags += [switches.cudnn_off(), switches.onednn_off()]
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
        flags.append(switches.compiled_code_off())
    if composed.wanted(modules):
        flags.append(composed.Composed())
    return flags
