"""Settings of the whole process that are others while sessions are open, in whichever threads."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_influence.caller import level_of_the_user

_counting = threading.RLock()


class Switch:
    """A context of the whole process: the first one in enters it, in whichever thread, and the last one out leaves it.

    So what is put back is what the first one found. Each thread on its own would find what others have set, and put
    back that.

    Args:
        context: makes it anew.
    """

    def __init__(self, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._context = context
        self._inside = 0
        self._way_out = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """For a block of one of them."""
        entered = False
        try:
            with _counting:
                if not self._inside:
                    self._way_out.enter_context(self._context())
                self._inside += 1
                entered = True
            yield
        finally:
            if entered:
                with _counting:
                    self._inside -= 1
                    if not self._inside:
                        self._way_out.close()


def _in_a_child() -> None:
    """In a process made by fork nobody is left who would open this lock, had another thread just closed it."""
    global _counting
    _counting = threading.RLock()


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(after_in_child=_in_a_child)


@contextlib.contextmanager
def _off(backend: Any) -> Iterator[None]:
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before


@contextlib.contextmanager
def _mha_fastpath_off() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
def _without_advice_on_vmap() -> Iterator[None]:
    """One filter: ``warnings.catch_warnings`` puts back all filters, and loses what other threads have set since."""
    lists: list[Any] = [warnings.filters]
    before = list(warnings.filters)
    warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
    ours = [one for one in warnings.filters if one not in before]
    try:
        yield
    finally:
        lists.append(warnings.filters)  # a copy, while somebody catches warnings
        for filters in lists:
            for one in ours:
                if one in filters:
                    filters.remove(one)


fused_attention_off = Switch(lambda: sdpa_kernel(SDPBackend.MATH))
mha_fastpath_off = Switch(_mha_fastpath_off)
cudnn_off = Switch(lambda: _off(torch.backends.cudnn))
onednn_off = Switch(lambda: _off(torch.backends.mkldnn))
compiled_code_off = Switch(lambda: torch.compiler.set_stance("force_eager"))
precise_convolutions = Switch(_precise_convolutions)
quiet_vmap = Switch(_without_advice_on_vmap)


@contextlib.contextmanager
def without_autocast(kinds: Iterable[str]) -> Iterator[None]:
    """Switches off an autocast around the call, on these kinds of device, with a warning: it is the thread's own.

    Gradients and products have the parameters' precision.
    An autocast inside of the model or the objective is theirs, and stays.
    """
    on = [kind for kind in {"cpu", *kinds} if torch.is_autocast_enabled(kind)]
    if on:
        warnings.warn(
            f"torch.autocast is on around this call, and is ignored: it would round gradients and products to "
            f"{torch.get_autocast_dtype(on[0])}; they are computed in the parameters' own dtype",
            UserWarning,
            stacklevel=level_of_the_user(),
        )
    with contextlib.ExitStack() as stack:
        for kind in on:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
