"""Checks what a module is given: each error says what was expected, what was got and what to do."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils import data

from torch_influence.caller import level_of_the_user
from torch_influence.objective import BaseObjective

_PLACES: dict[str, tuple[str, Any]] = {
    "model": ("a torch.nn.Module", nn.Module),
    "objective": ("a BaseObjective", BaseObjective),
    "train_loader": ("a torch.utils.data.DataLoader", data.DataLoader),
    "test_loader": ("a torch.utils.data.DataLoader", data.DataLoader),
    "device": ("a torch.device or the name of one", str | torch.device),
}
_METHODS = {
    "train_outputs": ("model", "batch"),
    "train_loss_on_outputs": ("outputs", "batch"),
    "train_regularization": ("params",),
    "train_loss": ("model", "params", "batch"),
    "test_loss": ("model", "params", "batch"),
}


def check_places(**given: Any) -> None:
    """Says which of a constructor's arguments are in each other's place."""
    for name, value in given.items():
        expected, kind = _PLACES[name]
        if isinstance(value, kind) or (name == "objective" and not _missing(value)):
            continue
        belongs = [other for other, (_, its) in _PLACES.items() if isinstance(value, its)]
        swapped = [other for other in belongs if isinstance(given[other], kind)]
        if not swapped and (not belongs or isinstance(value, str) or name == "objective"):
            continue  # the argument's own check says more
        what = f"{name} and {swapped[0]} are swapped" if swapped else f"that is what {' or '.join(belongs)} takes"
        raise TypeError(
            f"{name}: expected {expected}, got {type(value).__name__}; {what}, the order is ({', '.join(_PLACES)})"
        )


def check_device(device: Any) -> torch.device:
    """Checks that this device can be used here, and returns it."""
    try:
        if device is None or isinstance(device, bool):
            raise TypeError
        found = torch.device(device)
    except (TypeError, RuntimeError):
        raise TypeError(
            f"device: expected a torch.device or the name of one, as 'cpu' or 'cuda:0', got {device!r}"
        ) from None
    if found.type == "meta":
        raise ValueError("device: tensors on 'meta' have no values to compute with, use 'cpu' or an accelerator")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device: {str(found)!r} can't be used here ({reason}); use 'cpu'") from error
    return found


def check_model(model: Any) -> None:
    """Checks that the model's tensors have values; warns of NaN, and of layers that depend on the rest of the batch."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {_no_model(model)}")
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(t):
            raise ValueError(
                f"model: {name} has no shape yet, it belongs to a lazy layer: run one batch through the model first"
            )
        if t.is_meta:
            raise ValueError(f"model: {name} is on the meta device and has no values: load them first")
        if isinstance(t, nn.Parameter) and t.requires_grad and (bad := _count_of_nan(t.detach())):
            warnings.warn(
                f"model: {bad} of {t.numel()} entries of {name} are NaN, and so will be scores: the training has "
                "diverged, or the wrong file was loaded",
                RuntimeWarning,
                stacklevel=level_of_the_user(),
            )
    if found := normalised_by_the_batch(model):
        warnings.warn(
            f"model: {found} normalises by the batch, since it has no running statistics: its output for one example "
            "depends on the others in the batch, and scores are of batches of one example. Train it with "
            "track_running_stats=True, or use GroupNorm",
            UserWarning,
            stacklevel=level_of_the_user(),
        )


def normalised_by_the_batch(model: nn.Module) -> str:
    """Names the first layer that has no running statistics, with its class; "" if there is none."""
    for name, m in model.named_modules():
        if isinstance(m, _BatchNorm) and m.running_mean is None and m.running_var is None:
            return f"{type(m).__name__} {name!r}"
    return ""


def check_objective(objective: Any) -> None:
    """Checks that this is a BaseObjective, or has its methods, and that these take the arguments they will be given."""
    if isinstance(objective, type) and not _missing(objective):
        raise TypeError(
            f"objective: expected an instance, got the class {objective.__name__}; write {objective.__name__}()"
        )
    if missing := _missing(objective):
        loss = callable(objective) or isinstance(objective, type)
        hint = "a loss is called in its train_loss_on_outputs and test_loss" if loss else f"no {', '.join(missing)}"
        name = f"the class {objective.__name__}" if isinstance(objective, type) else type(objective).__name__
        raise TypeError(f"objective: expected a BaseObjective, got {name}; {hint}")
    for name, arguments in _METHODS.items():
        if (found := _takes_other_arguments(getattr(objective, name), arguments, by_name=name == "test_loss")) != "":
            raise TypeError(f"objective: expected {name}({', '.join(arguments)}), got {name}{found}")


def check_damp(damp: Any) -> float:
    """Checks that this is a finite number >= 0, of Python, NumPy, torch or a ``Damping``; returns it as a float."""
    try:
        value = None if isinstance(damp, str | bytes | bool | np.bool_) else float(damp)
    except (TypeError, ValueError, RuntimeError):
        value = None
    if value is None:
        raise TypeError(
            f"damp: expected a number, got {damp!r} of {type(damp).__name__}; module.suggest_damping() finds one"
        )
    if not math.isfinite(value):
        raise ValueError(f"damp: expected a finite number, got {value}; module.suggest_damping() finds one")
    if value < 0:
        raise ValueError(f"damp: expected a number >= 0, got {value:g}; module.suggest_damping() finds one")
    return value


def check_flag(name: str, value: Any) -> bool:
    """Checks that this is True or False, and not a text, which would count as True."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, got {value!r} of {type(value).__name__}")
    return bool(value)


def _count_of_nan(t: torch.Tensor) -> int:
    """Counts the entries that are NaN. Most tensors have none: their sum shows that, without a mask of their size."""
    return int(t.isnan().sum()) if t.dtype.itemsize > 1 and t.sum().isnan() else 0


def _missing(objective: Any) -> list[str]:
    return [name for name in _METHODS if not callable(getattr(objective, name, None))]


def _takes_other_arguments(method: Callable[..., Any], arguments: tuple[str, ...], by_name: bool) -> str:
    """Returns the arguments that a method takes, if it does not take these; "" if it does."""
    try:
        signature = inspect.signature(method, follow_wrapped=False)
    except (TypeError, ValueError):  # it may not be written in Python
        return ""
    if by_name and {*arguments} <= signature.parameters.keys():
        return ""
    try:
        signature.bind(*arguments)
    except TypeError:
        return f"({', '.join(signature.parameters)})"
    return ""


def _no_model(given: Any) -> str:
    """Says what was given in place of a model, and what to do."""
    kind = type(given).__name__
    if isinstance(given, type):
        return f"the class {given.__name__}; build one, {given.__name__}(...)"
    if isinstance(given, Mapping):
        return f"{kind}; load it into a model first, model.load_state_dict(...)"
    if isinstance(given, str | os.PathLike):
        return f"{kind}; load the model from there first"
    if callable(given):
        return f"{kind}; the parameters are looked for in a module: give the one that it calls"
    return kind
