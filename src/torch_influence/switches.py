"""Settings of the whole process that are changed while sessions are open, in any thread."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_influence import products
from torch_influence.caller import level_of_the_user

_counting = threading.RLock()


class Switch:
    """A context of the whole process: the first thread that needs it enters it, the last one leaves it.

    So what is put back is what the first thread found. If each thread entered by itself, a later one would find, and
    put back, what an earlier one had set.

    Args:
        context: makes a new context.
    """

    def __init__(self, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._context = context
        self._inside = 0
        self._way_out = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Keeps the context entered while the block runs."""
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
    """Replaces the lock in a process made by fork: a thread that held it does not exist there, and can't release it."""
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
    """Runs convolutions and RNNs in full float32, as matrix products are, unless the user has set something else.

    By default torch lets cuDNN round their operands to TF32, a relative 5e-4: more than the tolerance of a solve, and
    more than fast paths may differ from plain ones. Settings of the user are kept: TF32 in matrix products
    (``torch.set_float32_matmul_precision("high")``) or everywhere (``torch.backends.fp32_precision = "tf32"``), and
    any of cuDNN's that is not torch's default. The older of torch's two switches is used: with the newer one, reading
    the older (``torch.backends.cudnn.flags`` in somebody's forward) is an error.
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
    """Adds and removes one filter: ``warnings.catch_warnings`` would also undo what other threads have set since."""
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
quick_products = Switch(products.fastest)


@contextlib.contextmanager
def without_autocast(kinds: Iterable[str]) -> Iterator[None]:
    """Switches off an autocast around the call, on these kinds of device, with a warning; it is a setting per thread.

    Gradients and products have the parameters' precision.
    An autocast inside the model or the objective stays on.
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
