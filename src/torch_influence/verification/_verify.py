"""verify(): runs the checks, and refits where these are wanted."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_influence.evaluation import Evaluation
from torch_influence.parameters import ParameterSpace
from torch_influence.problem import Problem
from torch_influence.staleness import fingerprint
from torch_influence.verification._checks import CHECKS, AsCheck, Evidence
from torch_influence.verification._comparisons import refitted, to_leave_out
from torch_influence.verification._results import Check, Refits, Verification

if TYPE_CHECKING:
    from torch_influence.base import BaseInfluenceModule

_EXAMPLES = 5  # whose scores are compared


def verify(
    module: BaseInfluenceModule,
    problem: Problem,
    test_idxs: Sequence[int] | None,
    train_idxs: Sequence[int] | None,
    fit: Callable[[list[int]], nn.Module] | None,
    *,
    queries: int,
    refits: int,
    checks: Sequence[AsCheck],
    print: bool,
) -> Verification:
    """See BaseInfluenceModule.verify, whose arguments these are."""
    say = builtins.print if print else _silent
    if queries < 1 or refits < 3:
        raise ValueError(f"queries, refits: expected at least 1 and 3, got {queries} and {refits}")
    if fit is not None and (isinstance(fit, nn.Module) or not callable(fit)):
        raise TypeError(f"fit: expected a function that trains another model, got {type(fit).__name__}")
    test = problem.test
    chosen = test.indices(test_idxs, "test_idxs") if test_idxs is not None else _spread(test.n, queries)
    pool = problem.train.indices(train_idxs, "train_idxs")
    if not chosen or not pool:
        raise ValueError("test_idxs, train_idxs: expected at least one index, or None, got none")
    done: list[Check] = []
    with module._session():
        few = [pool[i] for i in _spread(len(pool), max(_EXAMPLES, queries))]
        evidence = Evidence(module, problem, chosen[:queries], few)
        for made in (*CHECKS, *checks):
            if (found := made(evidence)) is not None:
                done.append(found)
                say(found)
    changes = None
    if fit is not None:
        changes = _Fits(module, problem, fit, chosen).compared(pool, refits, say)
        for found in refitted(changes, problem.space.pass_dtype):
            done.append(found)
            say(found)
    result = Verification(done, changes)
    say(result.summary())
    return result


class _Fits:
    """Refits by the user's function, which runs outside of sessions, whose settings are not for training."""

    def __init__(
        self,
        module: BaseInfluenceModule,
        problem: Problem,
        fit: Callable[[list[int]], nn.Module],
        queries: list[int],
    ) -> None:
        self._module, self._problem, self._fit, self._queries = module, problem, fit, queries

    def compared(self, pool: list[int], count: int, say: Callable[[Any], None]) -> Refits:
        """Leaves some of these examples out, one at a time."""
        problem, queries = self._problem, self._queries
        scores = self._module.influences(pool, queries).double()
        if len(scores) < 3:
            raise ValueError(f"train_idxs: expected at least 3 examples to choose from, got {len(scores)}")
        chosen = to_leave_out(scores, count)
        everything = list(range(problem.train.n))
        total = len(chosen) + 2
        base, again = (self._loss(everything) for _ in range(2))
        say(f"refits 1 and 2 of {total}: all examples, mean test loss {base:.6g} and {again:.6g}")
        actual = []
        for number, position in enumerate(chosen, start=3):
            i = pool[position]
            change = self._loss([j for j in everything if j != i]) - base
            say(
                f"refit {number} of {total}: without example {i}, predicted {float(scores[position]):+.4g}, "
                f"actual {change:+.4g}"
            )
            actual.append(change)
        return Refits(
            indices=tuple(pool[position] for position in chosen),
            predicted=scores[chosen],
            actual=torch.tensor(actual, dtype=torch.float64, device="cpu"),
            model_loss=problem.mean_test_loss(queries),
            base=base,
            again=again,
        )

    def _loss(self, indices: list[int]) -> float:
        """The mean test loss of a model that is trained on these examples."""
        evaluation = self._problem.evaluation
        before = fingerprint(evaluation)
        model = self._fit(indices)
        if not isinstance(model, nn.Module):
            raise TypeError(f"fit: expected it to return a torch.nn.Module, got {type(model).__name__}")
        if model is evaluation.model or fingerprint(evaluation) != before:
            raise ValueError(
                "fit: expected a new model, got the module's own, or one that shares its parameters, which have been "
                "trained further; build a model in fit, or start from copy.deepcopy of one"
            )
        other = Evaluation(model.to(self._problem.device), self._problem.objective, ParameterSpace(model))
        return self._problem.mean_test_loss(self._queries, other)


def _spread(n: int, count: int) -> list[int]:
    """Up to ``count`` of range(n), at equal distances, both ends among them."""
    return sorted({round(i * (n - 1) / max(count - 1, 1)) for i in range(count)})


def _silent(line: Any) -> None:
    pass
