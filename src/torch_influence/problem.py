"""Problem: a model with an objective, data, selected parameters and a damping, and whether it is still what it was."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_influence import memory
from torch_influence.arguments import check_damp, check_flag, check_model, check_objective
from torch_influence.batches import Batches
from torch_influence.caller import level_of_the_user
from torch_influence.curvature import Curvature, Kind, Rounded, check_kind, fastest, made
from torch_influence.evaluation import Evaluation
from torch_influence.failures import OnFailure, fail
from torch_influence.gradients import (
    ExampleGradients,
    NondeterminismWarning,
    mean_gradient,
    randomness,
    regularizer_gradient,
)
from torch_influence.losses import Means, not_a_mean, tell
from torch_influence.memory import Cache, budget
from torch_influence.objective import BaseObjective
from torch_influence.parameters import ParameterSpace, Selection
from torch_influence.staleness import Source, Watch
from torch_influence.turns import Once, alone_with


class Problem:
    """All that a question of influence is about. It knows no solver and no score.

    Everything may be set at any time. ``version`` moves whenever the model, the objective, the data or the parameters
    are not what they were, and not with the damping: curvatures are kept by it, undamped.

    Args:
        model, objective, train_loader, test_loader, device, params, cache, progress, on_failure: see
            BaseInfluenceModule.
        to_device: moves a batch to the device.

    Attributes:
        watch: looks for changes.
        space: the selected parameters.
        evaluation: the objective as a function of them.
        train: the training data.
        kind: which curvature, by name or as a class.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: Any,
        test_loader: Any,
        device: torch.device,
        *,
        params: Selection = None,
        cache: Cache = "auto",
        progress: bool = False,
        on_failure: OnFailure = "warn",
        to_device: Callable[[Any], Any],
    ) -> None:
        self.device, self.progress, self.on_failure = device, progress, on_failure
        self._params, self._cache, self._to_device = params, cache, to_device
        self._damp = 0.0
        self._kind: Kind = "hessian"
        self.watch = Watch()
        self._curvature: tuple[Any, Curvature] | None = None
        self._rounded: Rounded | None = None
        self.findings: dict[str, str] = {}  # of ``check_loss``, by loss; "" for none
        self._looked_for_randomness: set[str] = set()
        self._evaluate(model, objective)
        self.train_loader = train_loader
        self.test_loader = test_loader

    # -- what it is made of -------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.evaluation.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._evaluate(model, self.objective)

    @property
    def objective(self) -> BaseObjective:
        """The losses."""
        return self.evaluation.objective

    @objective.setter
    def objective(self, objective: BaseObjective) -> None:
        self._evaluate(self.model, objective)

    @property
    def train_loader(self) -> Any:
        """The loader of the training data."""
        return self._train_loader

    @train_loader.setter
    def train_loader(self, loader: Any) -> None:
        self.train = self._batches(loader, "train_loader")
        self._train_loader = loader
        self._start_anew()

    @property
    def test_loader(self) -> Any:
        """The loader of the test data, or None."""
        return self._test_loader

    @test_loader.setter
    def test_loader(self, loader: Any) -> None:
        vars(self).pop("test", None)
        self._test_loader = loader
        self.findings.pop("test_loss", None)
        self._looked_for_randomness.discard("test_loss")

    @Once
    def test(self) -> Batches:
        """The test data."""
        return self._batches(self.test_loader, "test_loader")

    @property
    def damp(self) -> float:
        """λ, which is added once to the curvature."""
        return self._damp

    @damp.setter
    def damp(self, damp: float) -> None:
        self._damp = check_damp(damp)

    @property
    def kind(self) -> Kind:
        """Which curvature: "hessian", "gauss-newton" or a subclass of Curvature."""
        return self._kind

    @kind.setter
    def kind(self, kind: Kind) -> None:
        self._kind = check_kind(kind)

    @property
    def gnh(self) -> bool:
        """Whether the curvature is Gauss-Newton's: an older spelling of ``kind``."""
        return self.kind == "gauss-newton"

    @gnh.setter
    def gnh(self, gnh: bool) -> None:
        self.kind = "gauss-newton" if check_flag("gnh", gnh) else "hessian"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row [d]."""
        return self.space.size * torch.finfo(self.space.dtype).bits // 8

    # -- sessions, and whether anything has changed -------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Moves whenever something has changed: what was made under another one is out of date."""
        return self.watch.version

    @property
    def seen(self) -> tuple[Any, ...]:
        """Equals what it was as long as no change was seen; unlike ``version`` also after ``clear``."""
        return self.watch.fingerprint, self.watch.changes

    @property
    def is_open(self) -> bool:
        """Whether this thread has a session open."""
        return self.evaluation.is_open

    @contextlib.contextmanager
    def session(self) -> Iterator[bool]:
        """A block in which losses can be evaluated; yields whether the version has moved since the last one.

        That is looked for before the mode is changed: a layer that merges weights in eval mode makes the same of the
        same each time, but maybe in another place. Inside of another session the block does nothing.
        """
        if self.is_open:
            yield False
            return
        with self.evaluation.opened():
            self.refresh_data()
            self.watch.open(self.evaluation)
            try:
                with self.evaluation.in_eval_mode():
                    yield self._look()
            finally:
                self.watch.close(self.evaluation)

    def refresh_data(self) -> None:
        """Drops data that have changed."""
        if not self.watch.is_frozen:
            for batches in self._opened():
                batches.refresh()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """A block in which nothing is looked at, once everything has been."""
        holder = object()
        try:
            with self.session():
                self.watch.freeze(holder)
            yield
        finally:
            self.watch.thaw(holder)

    def clear(self) -> None:
        """Drops the data that are kept, and all that was made of them."""
        for batches in self._opened():
            batches.clear()
        self.watch.drop()
        self._drop()

    def __getstate__(self) -> dict[str, Any]:
        """Drops what is kept."""
        with self.evaluation.alone():
            self.clear()
        return vars(self)

    # -- the curvature and gradients ----------------------------------------------------------------------------------

    def curvature(self, streamed: bool = True) -> Curvature:
        """The undamped curvature of this version, made once. Inside a session.

        ``streamed``: data that are too large to be kept may be read once more for a faster form.
        """
        self.check_loss("train_loss")
        key = self.version, self.kind
        if self._curvature is None or self._curvature[0] != key:
            self._curvature = None  # before another one is made
            allowed = budget(self._cache, self.device) - self.train.kept_bytes
            told = bool(self.findings["train_loss"])
            plain = made(self.kind, self.evaluation, self.train, self.device, allowed, told)
            self._curvature = key, fastest(plain, streamed)
            if found := self._curvature[1].doubts(memory.free_memory(self.device) / 4):
                fail(found, self.on_failure)
        return self._curvature[1]

    def rounded(self, dtype: torch.dtype, streamed: bool = True) -> Rounded:
        """Makes the same with products in a narrower dtype, once. Inside a session."""
        curvature = self.curvature(streamed)
        if self._rounded is None or self._rounded.exact is not curvature:
            self._rounded = Rounded(curvature, dtype)
        return self._rounded

    def mean_gradient(self, loss: str, indices: list[int]) -> Tensor:
        """Gradient [d] of the mean of ``"train_loss"`` or ``"test_loss"`` over these examples."""
        if not indices:
            raise ValueError(
                f"{loss}_grad: expected at least one index, got none; the mean over no examples is undefined"
            )
        batches = self.data(loss)
        with self.session():
            self.check_loss(loss)
            means = Means(loss, self.evaluation, batches)
            look = None if self.findings[loss] else means.add
            gradient = mean_gradient(getattr(self.evaluation, loss), self.evaluation, batches, indices, look)
            means.conclude()
            return gradient

    def train_gradients(self, of_all: bool = False) -> ExampleGradients:
        """Gradients of single training examples, regulariser included. Inside a session.

        ``of_all``: they are computed in the way in which those of all examples would be.
        """
        self.check_loss("train_loss")
        evaluation, kept = self.evaluation, None
        if self._curvature is not None and self._curvature[0][0] == self.version:
            kept = self._curvature[1].examples
            if kept is not None and of_all and not kept.has(range(self.train.n)):
                kept = None
        loss = evaluation.train_loss
        if evaluation.overrides_train_loss:  # its parts are not known
            return ExampleGradients(loss, evaluation, self.train, "scores", kept=kept)
        constant = regularizer_gradient(evaluation)
        return ExampleGradients(loss, evaluation, self.train, "scores", evaluation.data_loss, constant, kept)

    def test_gradients(self) -> ExampleGradients:
        """Gradients of single test examples. Inside a session."""
        self.check_loss("test_loss")
        return ExampleGradients(self.evaluation.test_loss, self.evaluation, self.test, "test gradients")

    def mean_test_loss(self, queries: list[int], evaluation: Evaluation | None = None) -> float:
        """The mean test loss over these examples, of this model or another one's evaluation."""
        evaluation = evaluation or self.evaluation
        with evaluation.session(), self.test.quietly():
            leaves = evaluation.leaves()
            return float(self.test.mean(lambda batch: evaluation.test_loss(leaves, batch).detach().double(), queries))

    def data(self, loss: str) -> Batches:
        """The data that a loss is of."""
        return self.train if loss == "train_loss" else self.test

    def read_anew(self, loss: str) -> Batches:
        """Opens the same data once more, so that nothing of it is kept."""
        name = loss.replace("_loss", "_loader")
        return Batches(getattr(self, name), name, self._to_device, self.bar, cache=False)

    def as_rows(self, vecs: Any, argument: str, vectors_only: bool = False) -> Tensor:
        """Vectors of the user's as rows [k, d] on the device."""
        d = self.space.size
        if not isinstance(vecs, Tensor):
            raise TypeError(f"{argument}: expected a tensor, got {type(vecs).__name__}")
        if vecs.dim() not in ((1,) if vectors_only else (1, 2)) or vecs.shape[-1] != d:
            shapes = f"[{d}]" if vectors_only else f"[{d}] or [k, {d}]"
            raise ValueError(f"{argument}: expected shape {shapes}, got {list(vecs.shape)}")
        return vecs.detach().to(self.device, self.space.dtype).reshape(-1, d)

    def no_rows(self, k: int = 0) -> Tensor:
        """Rows [k, d] to be written to."""
        return torch.empty(k, self.space.size, dtype=self.space.dtype, device=self.device)

    def bar(self, iterable: Iterable[Any], describe: str, total: int | None) -> Iterable[Any]:
        """The same, in a progress bar if these are wanted."""
        if not self.progress:
            return iterable
        from tqdm.auto import tqdm  # imported when wanted: it probes for a notebook

        return tqdm(iterable, desc=describe, total=total, leave=False, disable=None)  # None: only on a terminal

    # -- checks of the user's losses ----------------------------------------------------------------------------------

    def check_loss(self, loss: str) -> None:
        """Warns once of a loss that is no mean over the batch, or random: nothing else would show it."""
        if loss not in self.findings:
            own = self.space.pass_dtype
            finding = not_a_mean(loss, self.evaluation, self.data(loss))
            self.findings[loss] = finding  # now, and not when an exception has ended it
            tell(finding)
            if (seen := self.space.pass_dtype) != own and seen in (torch.bfloat16, torch.float16):
                warnings.warn(
                    f"{loss}: it is computed in {seen} in part, and the parameters are {own}; torch.autocast is on "
                    "inside of the model or the objective, or something is cast: gradients and products are rounded to "
                    "it. Leave it out for influence",
                    UserWarning,
                    stacklevel=level_of_the_user(),
                )
        if loss not in self._looked_for_randomness:
            why = randomness(loss, self.evaluation, self.data(loss))
            self._looked_for_randomness.add(loss)
            if why:
                self.watch.told = True  # of what the looks for changes would say of it again
                fail([NondeterminismWarning(why)], self.on_failure)

    def warn_if_train_loss_is_overridden(self) -> None:
        """Warns where Gauss-Newton is of other losses than scores are."""
        if self.gnh and self.evaluation.overrides_train_loss:
            warnings.warn(
                "objective.train_loss is overridden, but with gnh=True the curvature is built from train_outputs, "
                "train_loss_on_outputs and train_regularization; scores still use train_loss",
                UserWarning,
                stacklevel=level_of_the_user(),
            )

    # -- private ------------------------------------------------------------------------------------------------------

    def _evaluate(self, model: nn.Module, objective: BaseObjective) -> None:
        """Looks at this model with this objective from now on."""
        check_model(model)
        check_objective(objective)
        with alone_with(*model.modules()):  # no other thread has other tensors in it
            self.space = ParameterSpace(model.to(self.device), self._params)
        self.evaluation = Evaluation(model, objective, self.space)
        self._start_anew()

    def _start_anew(self) -> None:
        """Moves the version, and forgets what users have been told."""
        self.findings.clear()
        self.watch.start_anew()
        self._drop()

    def _look(self) -> bool:
        """Looks for changes; tells whether there were any, with what was kept dropped."""
        before = self.version
        self.watch.look(self.evaluation, self._sources(), self._losses_hold)
        if self.version == before:
            return False
        self._drop()
        return True

    def _sources(self) -> list[Source]:
        """Lists the losses that what is kept was made of: nothing that is made of test losses is kept."""
        if not self.evaluation.overrides_train_loss:
            return [("data_loss", self.train)]
        return [("train_loss", self.train)] + ([("data_loss", self.train)] if self.kind != "hessian" else [])

    def _losses_hold(self) -> bool | None:
        """Tells whether all training losses are those that the curvature was made of; None where that is not known."""
        return None if self._curvature is None else self._curvature[1].losses_hold()

    def _drop(self) -> None:
        self._curvature = self._rounded = None
        self._looked_for_randomness.clear()

    def _batches(self, loader: Any, name: str) -> Batches:
        return Batches(loader, name, self._to_device, self.bar, self._cache)

    def _opened(self) -> list[Batches]:
        """Lists the data sets that are in use so far."""
        return [batches for name in ("train", "test") if (batches := vars(self).get(name)) is not None]
