"""Checks of the ops' arguments: TypeError or ValueError that name the argument, what was expected and what was got."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Checks that this is a floating-point tensor that no graph is recorded for."""
    _check_tensor(op, name, tensor)
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{op}: {name}: expected dtype float32, float64, float16 or bfloat16, got {tensor.dtype}")
    _check_no_graph(op, name, tensor)


def check_rows(op: str, name: str, tensor: Tensor) -> None:
    """Checks that this is a floating-point tensor [rows, columns] that no graph is recorded for."""
    check_floating(op, name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name}: expected 2 dimensions, got shape {tuple(tensor.shape)}")


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Checks that a tensor has the shape, dtype and device of another one, and no graph."""
    _check_tensor(op, name, tensor)
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name}: expected dtype {like.dtype}, as {like_name} has, got {tensor.dtype}")
    if tensor.shape != like.shape:
        raise ValueError(
            f"{op}: {name}: expected shape {tuple(like.shape)}, as {like_name} has, got {tuple(tensor.shape)}"
        )
    _check_device(op, name, tensor, like_name, like)
    _check_no_graph(op, name, tensor)


def check_beside(op: str, name: str, tensor: Tensor, dtype: torch.dtype, other_name: str, other: Tensor) -> None:
    """Checks that a tensor of any shape has this dtype, which goes with another's, the other's device, and no graph."""
    _check_tensor(op, name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(
            f"{op}: {name}: expected dtype {dtype}, since {other_name} has {other.dtype}, got {tensor.dtype}"
        )
    _check_device(op, name, tensor, other_name, other)
    _check_no_graph(op, name, tensor)


def check_written(op: str, name: str, tensor: Tensor) -> None:
    """Checks that a tensor can be written to: an expanded one holds the same memory several times."""
    if 0 not in tensor.stride() or not tensor.numel():  # the usual case, quickly
        return
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{op}: {name}: expected a tensor with memory of its own, got an expanded one; clone() it")


def check_number(op: str, name: str, value: float, nonzero: bool = False) -> None:
    """Checks that this is a finite number, and not zero with ``nonzero``."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or (nonzero and value == 0):
        raise ValueError(f"{op}: {name}: expected a finite {'nonzero ' if nonzero else ''}number, got {value}")


def _check_tensor(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")


def _check_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name}: expected device {like.device}, as {like_name} has, got {tensor.device}")


def _check_no_graph(op: str, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"{op}: {name}: expected a tensor without gradient, since {op} isn't differentiable; detach() it"
        )
