"""What a module is made of, each of which may be set at any time: the model, the objective, the data, the damping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_influence.arguments import check_damp, check_model, check_objective
from torch_influence.batches import Batches
from torch_influence.evaluation import Evaluation
from torch_influence.objective import BaseObjective
from torch_influence.parameters import ParameterSpace, Selection
from torch_influence.resident import Cache
from torch_influence.staleness import Source, Watch
from torch_influence.turns import Once, alone_with


class Parts:
    """Mixed into BaseInfluenceModule; ``model`` itself is in legacy.py, which may have another in its place."""

    device: torch.device

    if TYPE_CHECKING:  # what BaseInfluenceModule has
        gnh: bool

        def clear_cache(self) -> None: ...  # noqa: D102
        def _losses_hold(self) -> bool | None: ...
        def _transfer_to_device(self, batch: Any) -> Any: ...
        def _bar(self, iterable: Iterable[Any], describe: str, total: int | None) -> Iterable[Any]: ...

    def _take(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: Any,
        test_loader: Any,
        params: Selection,
        cache: Cache,
    ) -> None:
        """Once, in the constructor."""
        self._params = params
        self._cache = cache
        self._calls = 0  # of public methods
        self._makes = 0  # how often the model, the objective or the training data were set
        self._means_checked: dict[str, str] = {}  # what was found
        self._randomness_checked: set[str] = set()
        self._valid_for: tuple[Any, ...] = ()
        self._watch = Watch(self._watched, self._losses_hold)
        self._evaluate(model, objective)
        self.train_loader = train_loader
        self.test_loader = test_loader

    @property
    def objective(self) -> BaseObjective:
        """The losses."""
        return self._evaluation.objective

    @objective.setter
    def objective(self, objective: BaseObjective) -> None:
        self._evaluate(self._evaluation.model, objective)  # not the stand-in that ``model`` may be

    @property
    def train_loader(self) -> Any:
        """The loader of the training data."""
        return self._train_loader

    @train_loader.setter
    def train_loader(self, loader: Any) -> None:
        self._train = self._batches_of(loader, "train_loader")
        self._train_loader = loader
        self._start_anew()

    @property
    def test_loader(self) -> Any:
        """The loader of the test data, or None."""
        return self._test_loader

    @test_loader.setter
    def test_loader(self, loader: Any) -> None:
        vars(self).pop("_test", None)
        self._test_loader = loader
        self._means_checked.pop("test_loss", None)
        self._randomness_checked.discard("test_loss")

    @property
    def damp(self) -> float:
        """λ, which is added once to the curvature; 0 where nothing else was set."""
        return vars(self).get("_damp", 0.0)

    @damp.setter
    def damp(self, damp: float) -> None:
        self._damp = check_damp(damp)

    # -- private ------------------------------------------------------------------------------------------------------

    @Once
    def _test(self) -> Batches:
        return self._batches_of(self.test_loader, "test_loader")

    def _evaluate(self, model: nn.Module, objective: BaseObjective) -> None:
        """Looks at this model with this objective from now on."""
        check_model(model)
        check_objective(objective)
        with alone_with(*model.modules()):  # no other thread has other tensors in it
            self._space = ParameterSpace(model.to(self.device), self._params)
        self._evaluation = Evaluation(model, objective, self._space)
        self._watch.now_of(self._evaluation)
        self._evaluation.on_open = self._refresh
        self._evaluation.on_ready = self._look
        self._evaluation.on_close = self._watch.close
        self.params_names = self._space.names
        self.params_shape = self._space.shapes
        self._start_anew()

    def _start_anew(self) -> None:
        """Nothing that was found out or kept holds any longer."""
        self._means_checked.clear()
        self._valid_for = ()
        self._watch.drop()
        self._makes += 1

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept, so that modules can be copied and pickled; drops it here, too."""
        self.clear_cache()
        self._valid_for = ()
        return vars(self)

    def _batches_of(self, loader: Any, name: str) -> Batches:
        return Batches(loader, name, self._transfer_to_device, self._bar, self._cache)

    def _opened(self) -> list[Batches]:
        """Of the two loaders, those in use so far."""
        return [batches for name in ("_train", "_test") if (batches := vars(self).get(name)) is not None]

    def _refresh(self) -> None:
        """Called when a public method begins, before the model is in eval mode."""
        self._calls += 1
        if not self._watch.is_frozen:
            for batches in self._opened():
                batches.refresh()
        self._watch.open()

    def _look(self) -> None:
        """Drops what is kept and is no longer true. Called when a public method begins, in eval mode."""
        self._watch.look()
        now = (self._watch.version, self.gnh, self._train.generation)
        if now != self._valid_for:
            self._forget()
            self._valid_for = now

    def _watched(self) -> list[Source]:
        """The losses that what is kept was made of: nothing that is made of test losses is."""
        if not self._evaluation.overrides_train_loss:
            return [("data_loss", self._train)]
        return [("train_loss", self._train)] + ([("data_loss", self._train)] if self.gnh else [])

    def _forget(self) -> None:
        """Drops what was found out and kept; subclasses drop what they have made of it."""
        self._randomness_checked.clear()
