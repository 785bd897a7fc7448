"""Curvature: what a module needs of the curvature of its training objective, whatever it is."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_influence.batches import Batches
from torch_influence.evaluation import Evaluation
from torch_influence.gradients import OuterProducts
from torch_influence.linop import LinearOperator
from torch_influence.plan import NotPossible, Step


class Curvature(LinearOperator):
    """The curvature of the training objective, undamped, at the model's parameters.

    A subclass has ``product`` and ``describe``, and beside them whatever of a LinearOperator it knows: ``diagonal``,
    ``dense``, ``inverse``, ``dual``. ``InfluenceModule(..., curvature=MyCurvature)`` takes the class. It is made once
    for each state of model, objective and data, and asked inside of a session, in which the model is in eval mode.

    Args:
        evaluation, batches, device: of the training data.
        budget: bytes that it may keep.
        told: whether the user has been told already that the loss is no mean over the batch.

    Attributes:
        title: its name, in words.
        kept_bytes: memory that it keeps.
        examples: what it knows of the gradients of single training examples, or None.

    Examples:
        >>> class Identity(Curvature):
        ...     title = "the identity"
        ...     def product(self, rows):
        ...         return rows.clone()
        ...     def describe(self):
        ...         return self.title
        >>> module = InfluenceModule(
        ...     model, objective, train_loader, test_loader, "cpu", damp=0.1, curvature=Identity
        ... )
        >>> module.explain()["curvature"].path
        'the identity'
    """

    title: str = ""
    kept_bytes: int = 0
    examples: OuterProducts | None = None

    def __init__(
        self,
        evaluation: Evaluation,
        batches: Batches,
        device: torch.device,
        budget: float = 0,
        told: bool = False,
    ) -> None:
        self.evaluation, self.batches, self.budget, self.told = evaluation, batches, budget, told
        self.size, self.dtype, self.device = evaluation.space.size, evaluation.space.dtype, device

    @abc.abstractmethod
    def describe(self) -> str:
        """The way in which it multiplies, in words."""

    def step(self) -> Step:
        """The curvature's line of ``explain()``."""
        return Step("curvature", self.describe(), self.kept_bytes)

    def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
        """``steps`` unbiased estimates, each from a minibatch; itself where a subclass does not say more."""
        for _ in range(steps):
            yield self

    def narrowed(self, dtype: torch.dtype) -> LinearOperator:
        """Returns the same curvature with products that are rounded to this dtype on the way.

        Raises:
            NotPossible: it has none.
        """
        raise NotPossible("this curvature has products in its own precision only")

    def doubts(self, room: float) -> list[Warning]:
        """Lists warnings of what is doubtful in it; ``room`` is how many bytes the look may take."""
        return []

    def losses_hold(self) -> bool | None:
        """Tells whether all training losses are still those that it was made of; None where that is not known."""
        return None

    # -- for verify() ---------------------------------------------------------------------------------------------

    def from_definition(self, row: Tensor, batches: Batches) -> tuple[Tensor, float]:
        """The product with one row [d] from the definition, over data read anew; see ``plain_product``.

        Raises:
            NotPossible: it has no other definition than ``product``.
        """
        raise NotPossible("it has no other definition to compare with")

    def second_derivative(self, batch: Any) -> Any:
        """Compares products with the curvature of one batch with differences of gradients; see ``SecondDerivative``.

        Raises:
            NotPossible: it is no second derivative.
        """
        raise NotPossible("it is no second derivative")
