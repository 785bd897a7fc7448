"""Several threads over one model: they take turns, each is right, and the model and the process are as before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Classification, loader, module, network
from test_side_effects import Snapshot, flags
from torch import Tensor, nn

from torch_influence import AutogradInfluenceModule, InfluenceModule, LiSSAInfluenceModule, switches, turns
from torch_influence.batches._batches import Batches, to_device
from torch_influence.batches._source import quiet
from torch_influence.curvature import Hessian
from torch_influence.evaluation import Evaluation
from torch_influence.parameters import ParameterSpace


@pytest.fixture(autouse=True)
def _quick_changes_of_thread() -> Iterator[None]:
    before, process = sys.getswitchinterval(), of_the_process()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    assert of_the_process() == process
    assert not turns._held
    assert not turns._waiting


def of_the_process() -> tuple[Any, ...]:
    silent = [pattern.pattern for _, pattern, *_ in warnings.filters if isinstance(pattern, re.Pattern)]
    return flags(), "There is a performance drop" in silent, warnings.showwarning


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls return, or raise, when all of them run at once."""
    found: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(i: int) -> None:
        start.wait()
        try:
            found[i] = calls[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads)
    return found


class Outer(nn.Module):
    """Has a model that others work with as a part."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def outer(inner: nn.Module) -> Outer:
    torch.manual_seed(3)
    return Outer(inner)


def estimate(model: nn.Module) -> Callable[[], Tensor]:
    it = module(LiSSAInfluenceModule, model=model, repeat=2, depth=4, generator=torch.Generator())

    def call() -> Tensor:
        it.generator.manual_seed(0)
        return torch.stack(it.influences(range(9), [0], standard_error=True))

    return call


def calls_of(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Each of a module of its own, but the last."""
    exact = {"damp": 1.0, "rtol": 1e-10}
    cg, block, direct = (
        module(InfluenceModule, model=model, solver=name, **exact) for name in ("cg", "block", "direct")
    )
    around = module(InfluenceModule, model=outer(model), **exact)
    shared = module(InfluenceModule, model=model, gnh=True, **exact)
    teacher = Classification()
    teacher.teachers = {"it": model}  # type: ignore[attr-defined]
    beside = module(InfluenceModule, model=network(), objective=teacher, **exact)
    return {
        "cg": lambda: cg.influence_matrix(),
        "block": lambda: block.influence_matrix([0, 1, 2]),
        "direct": lambda: direct.self_influences(),
        "autograd": lambda: module(AutogradInfluenceModule, model=model).influences([0, 1], [0]),
        "LiSSA": estimate(model),
        "a part of another": lambda: around.influences([0, 1], [0]),
        "held by an objective": lambda: beside.influences([0, 1], [0]),
        "parameters": lambda: cg.flat_parameters(),
        "shared, a solve": lambda: shared.stests(),
        "shared, another": lambda: shared.influence_matrix(top_k=2).helpful.values,
        "shared, batches": lambda: torch.cat([batch[0] for batch, _ in shared.batches()]),
        "shared, nothing kept": lambda: shared.clear_cache() or shared.hvp(torch.ones(43, dtype=torch.float64)),
    }


def test_threads_take_turns() -> None:
    model = network().train()
    model[2].eval()
    alone = {name: call() for name, call in calls_of(model).items()}
    before = Snapshot(model)
    calls = calls_of(model)
    found = in_threads(*(lambda call=call: [call() for _ in range(2)] for call in calls.values()))
    for (name, expected), results in zip(alone.items(), found, strict=True):
        assert isinstance(results, list), (name, results)
        for result in results:
            torch.testing.assert_close(result, expected, msg=lambda text, name=name: f"{name}: {text}")
    before.check()
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


class Breaks(Classification):
    """Ends its n-th evaluation with an error."""

    def __init__(self, left: int, error: BaseException) -> None:
        self.left, self.error = left, error

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        self.left -= 1
        if not self.left:
            raise self.error
        return super().train_outputs(model, batch)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_an_error_in_one_thread_is_none_in_others(error: BaseException) -> None:
    model = network().train()
    before, expected = Snapshot(model), module().influence_matrix()
    broken = [module(model=model, objective=Breaks(left, error)) for left in (1, 7)]
    whole = [module(model=model) for _ in range(2)]
    found = in_threads(*(it.influence_matrix for it in (broken[0], whole[0], broken[1], whole[1])))
    assert found[0] is error
    assert found[2] is error
    torch.testing.assert_close(found[1::2], [expected] * 2)
    before.check()


def evaluation(model: nn.Module) -> Evaluation:
    return Evaluation(model, Classification(), ParameterSpace(model))


def test_the_last_one_out_puts_back_what_the_first_one_found() -> None:
    """Of switches of the process, while threads over different models come and go in any order."""
    before, step = of_the_process(), threading.Barrier(2)

    def first() -> Any:
        with evaluation(nn.LSTM(2, 2)).session(), switches.quiet_vmap():
            step.wait()
            step.wait()  # the other one has come
        inside = of_the_process()
        step.wait()
        return inside

    def second() -> Any:
        step.wait()
        with evaluation(nn.LSTM(2, 2)).session(), switches.quiet_vmap():
            inside = of_the_process()
            step.wait()
            step.wait()  # the first one has gone
        return inside

    one, other = in_threads(first, second)
    assert one == other != before
    assert of_the_process() == before


def test_reports_in_threads_leave_warnings_as_they_were(tmp_path: Path) -> None:
    modules = [module(model=network()) for _ in range(2)]
    found = in_threads(*(lambda i=i: modules[i].report(tmp_path / f"{i}.html", [0]) for i in range(2)))
    assert [path.name for path in found] == ["0.html", "1.html"]  # the rest is seen after each test


class SeesHooks(Classification):
    """Notes hooks that are called for the modules of every thread."""

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        hooks = torch.nn.modules.module
        assert not (hooks._global_forward_pre_hooks)
        assert not (hooks._global_forward_hooks)
        return super().train_outputs(model, batch)


def test_operations_are_counted_without_hooks_into_all_modules() -> None:
    it = module(InfluenceModule, objective=SeesHooks(), damp=1.0)
    assert it.explain(3)["solver"].path == module(InfluenceModule, damp=1.0).explain(3)["solver"].path


def until_somebody_waits(count: int = 1) -> None:
    while len(turns._waiting) < count:
        time.sleep(0)


def test_who_would_wait_forever_is_told() -> None:
    one, other = evaluation(network()), evaluation(network())
    step = threading.Barrier(2)

    def outer(first: Evaluation, second: Evaluation) -> Any:
        with first.session():
            step.wait()
            with second.session():
                return "done"

    found = in_threads(lambda: outer(one, other), lambda: outer(other, one))
    assert "done" in found
    found.remove("done")
    with pytest.raises(RuntimeError, match="two threads wait for one another"):
        raise found[0]


def test_what_is_computed_once_keeps_no_other_thread_waiting() -> None:
    """Two threads over different models: one is quiet, the other waits for that while it counts operations."""
    data = Batches(loader(), "train_loader", lambda batch: to_device(batch, torch.device("cpu")), lambda *of: of[0])
    one, other = (Hessian(evaluation(network()), data, torch.device("cpu")) for _ in range(2))

    def first() -> float:
        with one.evaluation.session(), quiet():
            until_somebody_waits()
            return one.operations

    def second() -> float:
        with other.evaluation.session():
            while id(turns.RANDOM_STATES) not in turns._held:
                time.sleep(0)
            return other.operations

    assert len(set(in_threads(first, second))) == 1


def test_who_came_first_is_served_first() -> None:
    """Somebody who asks again at once, as in a loop, does not keep others from it."""
    model, served = network(), []

    def ask(name: str) -> None:
        with turns.alone_with(model):
            served.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("first", "second")]
    with turns.alone_with(model):
        for number, thread in enumerate(threads, start=1):
            thread.start()
            until_somebody_waits(number)
    ask("who asks again")
    for thread in threads:
        thread.join()
    assert served == ["first", "second", "who asks again"]


def test_a_draw_is_not_taken_for_another_threads() -> None:
    batches = Batches(loader(), "train_loader", lambda batch: to_device(batch, torch.device("cpu")), lambda *of: of[0])
    torch.manual_seed(5)
    batches.pass_by()
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    thread = threading.Thread(target=batches.pass_by)
    with quiet(seed=3) as drawn:
        thread.start()
        until_somebody_waits()
        assert not drawn()
    thread.join()
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_process_does_not_wait_for_threads_that_it_has_not() -> None:
    script = """
        import os, threading
        from problems import module, network
        from torch_influence.turns import alone_with

        model = network()
        inside, end = threading.Event(), threading.Event()

        def hold():
            with alone_with(*model.modules()):
                inside.set()
                end.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait()
        child = os.fork()
        if not child:
            os._exit(0 if module(model=model).influences([0], [0]).isfinite().all() else 1)
        print("child", os.waitpid(child, 0)[1])
        end.set()
        thread.join()
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.stdout.strip() == "child 0", done.stderr
