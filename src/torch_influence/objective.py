"""BaseObjective: what the user supplies about the training loss and the test loss."""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import nn

__all__ = ["BaseObjective"]


class BaseObjective(abc.ABC):
    """How a project computes its training loss and its test loss.

    A subclass implements four methods; from them the package builds

        ℓ(batch, θ) = train_loss_on_outputs(train_outputs(model, batch), batch) + train_regularization(θ)

    Losses are **means** over the examples of the batch. While a method runs, ``model`` is in eval mode and holds the
    parameters that are being differentiated, whichever way the method reaches them (``model(x)``, ``model.fc.weight``,
    ``model.features(x)``, ``model.parameters()``).

    Examples:
        >>> class Classification(BaseObjective):
        ...     def train_outputs(self, model, batch):
        ...         return model(batch[0])
        ...     def train_loss_on_outputs(self, outputs, batch):
        ...         return torch.nn.functional.cross_entropy(outputs, batch[1])
        ...     def train_regularization(self, params):
        ...         return 0.5e-2 * params.square().sum()
        ...     def test_loss(self, model, params, batch):
        ...         return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    """

    @abc.abstractmethod
    def train_outputs(self, model: nn.Module, batch: Any) -> Any:
        """Model outputs for a training batch: logits, predictions, probabilities.

        With ``gnh=True`` the outputs are a tensor, and they are where the Gauss-Newton matrix JᵀH_outJ is split:
        the part before them is linearised, the part after them keeps its exact second derivative.

        Args:
            model: yours, in eval mode, with the parameters that are being differentiated.
            batch: as the train loader collates it, on the module's device.

        Returns:
            Whatever ``train_loss_on_outputs`` takes; a tensor if ``gnh=True`` is to be used.
        """

    @abc.abstractmethod
    def train_loss_on_outputs(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Mean loss of these outputs over the batch, without regularisation.

        Convex in the outputs if the Gauss-Newton matrix is to be positive semi-definite.

        Args:
            outputs: of ``train_outputs``, of the same batch.
            batch: as the train loader collates it.

        Returns:
            A scalar tensor, the mean over the examples. A sum is noticed and warned of, and so are class weights or
            counts that divide a batch's loss (docs/meaning.md, "Weights and counts", has what to write instead).
        """

    @abc.abstractmethod
    def train_regularization(self, params: torch.Tensor) -> torch.Tensor | float:
        """Regularisation at a flat vector of all trainable parameters, a scalar; a plain number is fine.

        Args:
            params: [d], in the order of ``model.named_parameters()``, without frozen ones. Its dtype is that of the
                parameters, float32 for half-precision models.

        Returns:
            A scalar tensor, or a number. ``SGD(weight_decay=w)`` is ``0.5 * w * params.square().sum()``.
        """

    def train_loss(self, model: nn.Module, params: torch.Tensor, batch: Any) -> torch.Tensor:
        """Mean regularised training loss over the batch. Override only if it doesn't split into the parts above.

        The Hessian and all gradients use this method; the Gauss-Newton matrix can't (it needs the parts).

        Args:
            model: as in ``train_outputs``.
            params: as in ``train_regularization``.
            batch: as in ``train_outputs``.

        Returns:
            A scalar tensor.
        """
        outputs = checked_outputs(self.train_outputs(model, batch))
        loss = checked_loss(self.train_loss_on_outputs(outputs, batch), "train_loss_on_outputs")
        return loss + checked_regularization(self.train_regularization(params))

    @abc.abstractmethod
    def test_loss(self, model: nn.Module, params: torch.Tensor, batch: Any) -> torch.Tensor:
        """Mean loss over a batch of test data: the quantity whose change the scores predict.

        Args:
            model: as in ``train_outputs``.
            params: as in ``train_regularization``, for a test loss that has them in it.
            batch: as the test loader collates it, on the module's device.

        Returns:
            A scalar tensor, the mean over the examples. Any measurement will do: see docs/meaning.md.
        """


def checked_loss(loss: Any, method: str) -> torch.Tensor:
    """Checks that a method has returned a real scalar, [] or of one element, and returns it as a loss []."""
    expected = f"{method}: expected a scalar tensor (the mean loss over the batch)"
    if not isinstance(loss, torch.Tensor):
        hint = {type(None): "; does it return?", float: "; leave out .item()"}.get(type(loss), "")
        raise TypeError(f"{expected}, got {type(loss).__name__}{hint}")
    if loss.numel() != 1:
        raise ValueError(
            f"{method}: expected a scalar (the mean loss over the batch), got shape {tuple(loss.shape)}; "
            "reduce it with .mean()"
        )
    if not loss.is_floating_point():
        raise TypeError(f"{expected} of real floating-point numbers, got {loss.dtype}, which has no gradient")
    return loss.reshape(())


def checked_outputs(outputs: Any) -> Any:
    """Checks that train_outputs has returned something, and returns it."""
    if outputs is None:
        raise TypeError("train_outputs: expected what train_loss_on_outputs takes, got None; does it return?")
    return outputs


def checked_regularization(value: Any) -> torch.Tensor | float:
    """Checks that train_regularization has returned a real scalar, [] or of one element, or a finite number."""
    expected = "train_regularization: expected a scalar tensor or a number"
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{expected}, got shape {tuple(value.shape)}; sum it, as in 0.5 * l2 * params.square().sum()"
            )
        if value.is_complex():
            raise TypeError(f"{expected}, got {value.dtype}")
        return value.reshape(())
    try:
        number = None if value is None or isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None:
        hint = "; return 0.0 where there is none" if value is None else ""
        raise TypeError(f"{expected}, got {type(value).__name__}{hint}")
    if not math.isfinite(number):
        raise ValueError(f"{expected}, got {number}")
    return number
