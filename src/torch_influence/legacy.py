"""The private helpers of torch-influence 0.1.0 that subclasses had to use, without their effects on the model.

New code uses ``hvp``, ``batches`` and ``flat_parameters`` of BaseInfluenceModule.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torch_influence.batches import to_device
from torch_influence.curvature import GaussNewton, Hessian

if TYPE_CHECKING:
    import torch

    from torch_influence.problem import Problem


class LegacyHelpers:
    """Mixed into BaseInfluenceModule.

    ``_model_make_functional`` and ``_model_reinsert_params`` used to take the parameters out of the model and put
    others in. Here they work on a stand-in: between the two calls ``self.model`` is a copy of the model's structure
    that shares its tensors, and it is this copy that is given other parameters.
    """

    device: torch.device
    _problem: Problem
    _stand_in: nn.Module | None = None

    @property
    def is_model_functional(self) -> bool:
        """Whether ``model`` is the stand-in at the moment."""
        return self._stand_in is not None

    def _model_params(self, with_names: bool = True) -> tuple[Any, ...]:
        with self._problem.evaluation.alone():
            named = tuple(zip(self._problem.space.names, self._problem.space.current(), strict=True))
        return named if with_names else tuple(p for _, p in named)

    def _model_make_functional(self) -> tuple[Tensor, ...]:
        with self._problem.evaluation.alone():
            self._stand_in = _sharing_copy(self._problem.evaluation.model).eval()
            return self._problem.evaluation.leaves()

    def _model_reinsert_params(self, params: Sequence[Tensor], register: bool = False) -> None:
        if register:
            self._stand_in = None
            return
        if self._stand_in is None:
            self._stand_in = _sharing_copy(self._problem.evaluation.model).eval()
        places = _places(self._problem.evaluation.model)
        for p, value in zip(self._problem.space.current(), params, strict=True):
            for name in places[id(p)]:  # all names of a tied weight
                path, _, attribute = name.rpartition(".")
                owner = self._stand_in.get_submodule(path)
                owner._parameters[attribute] = value  # type: ignore[assignment]

    def _flatten_params_like(self, params_like: Sequence[Tensor]) -> Tensor:
        return self._problem.space.flatten(params_like)

    def _reshape_like_params(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self._problem.space.split(vec)

    def _transfer_to_device(self, batch: Any) -> Any:
        """Every batch passes through here; a subclass may override it for batches of its own kind."""
        return to_device(batch, self.device)

    def _loader_wrapper(
        self,
        train: bool,
        batch_size: int | None = None,
        subset: Sequence[int] | None = None,
        sample_n_batches: int = -1,
    ) -> Iterator[tuple[Any, int]]:
        sample = sample_n_batches if sample_n_batches > 0 else None
        return self.batches(train=train, batch_size=batch_size, idxs=subset, sample=sample)  # type: ignore[attr-defined]

    def _hvp_at_batch(self, batch: Any, flat_params: Tensor, vec: Tensor, gnh: bool) -> Tensor:
        curvature = (GaussNewton if gnh else Hessian)(self._problem.evaluation, self._problem.train, self.device)
        with self._problem.evaluation.session():
            return curvature.batch_product(batch, vec.detach()[None], self._problem.evaluation.leaves(flat_params))[0]


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's structure whose tensors are the model's own."""
    tensors = [t for m in model.modules() for t in (*vars(m).values(), *m._parameters.values(), *m._buffers.values())]
    return copy.deepcopy(model, {id(t): t for t in tensors if isinstance(t, Tensor)})


def _places(model: nn.Module) -> dict[int, list[str]]:
    places: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(p), []).append(name)
    return places
