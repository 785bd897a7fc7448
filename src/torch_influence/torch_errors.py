"""Errors of torch whose texts do not name the cause in this package's terms: raised again with what they mean here."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

_ONCE = "It can be differentiated once only, and has no second derivative, which the curvature needs"
_INSTEAD = (
    "Write it in plain torch operations; where it is part of the model, params= may select what comes after it; or "
    "rank by products of gradients, which need none: a subclass of BaseInfluenceModule whose inverse_hvp(vec) is vec"
)

# A pattern of torch's text, and what it means here, with \1 for the first group.
_MEANINGS = (
    (
        r"derivative for (?:aten::|')_?(\w+?)_backward\w*'? is not implemented",
        rf"the objective or the model uses torch's \1. {_ONCE}. {_INSTEAD}",
    ),
    (
        r"differentiate twice a function that was marked with @(once_differentiable)",
        rf"the objective or the model uses an autograd.Function marked with @\1. {_ONCE}. {_INSTEAD}",
    ),
    (
        r"[Dd]ouble backwards? is not supported for (\w+ \w+)",
        rf"the objective or the model uses \1. {_ONCE}. Run its forward with torch.backends.cudnn.flags(enabled=False)",
    ),
    (
        r"(torch\.compile) with aot_autograd does not currently support double backward",
        rf"the objective or the model has a part from \1. {_ONCE}. Give the module that was compiled",
    ),
    (
        r"(?:checkpoint is incompatible|Checkpointing is not compatible) with \.grad\(\)",
        "the model uses reentrant checkpointing, whose gradients torch.autograd.grad can't take: call checkpoint with "
        "use_reentrant=False, or switch it off (model.gradient_checkpointing_disable())",
    ),
    (
        r"Trying to backward through the graph a second time",
        "the graph of this batch has been used before: the model or the objective keeps tensors from one call to the "
        "next (the hidden state of an RNN?), or calls backward() itself. Leave that out, and start each forward anew",
    ),
    (
        r"Expected more than 1 value per channel when training",
        "a BatchNorm layer normalises by the batch, since it has no running statistics, and a batch of one example is "
        "too small for that; scores are of single examples. Train it with track_running_stats=True, or use GroupNorm",
    ),
)


def meaning(text: str) -> str:
    """Says what an error of torch means here; "" for an error that is not in the table."""
    for pattern, words in _MEANINGS:
        if found := re.search(pattern, text):
            return found.expand(words)
    return ""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raises these errors again with what they mean, in the same class; other errors pass unchanged."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        words = meaning(str(error)) if type(error) in (RuntimeError, NotImplementedError, ValueError) else ""
        if not words:
            raise
        raise type(error)(f"{words}. [{str(error).partition(chr(10))[0]}]") from error
