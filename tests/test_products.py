"""Products of float32 matrices on the CPU by oneDNN: only where their error is float32's, not beyond sessions."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Classification, loader, module, network
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import InfluenceModule, backend_info, products, solvers, switches
from torch_influence.ops import grad_dot, linear_curvature_product

YES, NO = products.Choice(True, "a test says so"), products.Choice(False, "a test says so")
needs_onednn = pytest.mark.skipif(
    products._refused_at_once() is not None or bool(products.setting_of_the_user()),
    reason=f"oneDNN can't be taken here: {products._refused_at_once()} {products.setting_of_the_user()}",
)


@pytest.fixture(autouse=True)
def _nothing_outlives_a_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TORCH_INFLUENCE_BACKEND", raising=False)
    monkeypatch.setattr(products, "LEAST_SIZE", 0)  # the problems of tests are small
    before = settings()
    yield
    assert settings() == before


def settings() -> dict[str, Any]:
    """What can be read of torch's precision of float32; reading raises nothing."""
    backends = torch.backends
    return {
        "older": torch.get_float32_matmul_precision(),
        "all": backends.fp32_precision,
        "oneDNN": backends.mkldnn.fp32_precision,
        "oneDNN, products": backends.mkldnn.matmul.fp32_precision,
        "oneDNN, convolutions": backends.mkldnn.conv.fp32_precision,
        "oneDNN, on": backends.mkldnn.enabled,
        "cuBLAS": backends.cuda.matmul.fp32_precision,
        "cuBLAS, older": backends.cuda.matmul.allow_tf32,
    }


class Calling(nn.Module):
    """Calls a function whenever it is called: what it saw is not put back with the model's attributes."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        self.function()
        return x


def around(function: Callable[[], Any]) -> nn.Module:
    """A network that calls this in its forward."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 40), Calling(function), nn.Linear(40, 4))


def problem(dtype: torch.dtype = torch.float32, model: nn.Module | None = None, **changes: Any) -> InfluenceModule:
    """A network wide enough for oneDNN, which leaves small products alone."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(150, 60, generator=generator), torch.randint(4, (150,), generator=generator)
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 4))
    loader = DataLoader(TensorDataset(x.to(dtype), y), batch_size=50)
    options = {"damp": 0.1, "gnh": True, "solver": "cg", "rtol": 1e-4} | changes
    return InfluenceModule(model.to(dtype), Classification(), loader, loader, "cpu", **options)


def rows(like: InfluenceModule, k: int = 8) -> Tensor:
    return torch.randn(k, like.flat_parameters().numel(), generator=torch.Generator().manual_seed(1))


# -- what is refused --------------------------------------------------------------------------------------------------


class Rounding(TorchFunctionMode):
    """Products with operands that were rounded: a library of lower precision, which really computes so."""

    def __init__(self, rounded: Callable[[Tensor], Tensor], when: Callable[[Tensor], bool] = lambda a: True) -> None:
        super().__init__()
        self.rounded, self.when = rounded, when

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.matmul, Tensor.matmul, Tensor.__matmul__, F.linear) and self.when(args[0]):
            args = (self.rounded(args[0]), self.rounded(args[1]), *args[2:])
        return function(*args, **(kwargs or {}))


def to_bfloat16(t: Tensor) -> Tensor:
    return t.bfloat16().float()


def to_tf32(t: Tensor) -> Tensor:
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def to_two_parts(t: Tensor) -> Tensor:
    return to_bfloat16(t) + to_bfloat16(t - to_bfloat16(t))


LOWER: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "bfloat16": lambda: Rounding(to_bfloat16),
    "bfloat16, by autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "TF32": lambda: Rounding(to_tf32),
    "two parts in bfloat16": lambda: Rounding(to_two_parts),
    "bfloat16 in large products": lambda: Rounding(to_bfloat16, lambda a: a.numel() > 250_000),
    "bfloat16 in batches": lambda: Rounding(to_bfloat16, lambda a: a.dim() == 3),
    "bfloat16 for short sides": lambda: Rounding(to_bfloat16, lambda a: a.shape[-1] == 16),
}


@pytest.mark.parametrize("lower", LOWER)
def test_lower_precision_is_refused(lower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = problem()
    monkeypatch.setattr(products, "_choice", NO)
    v = rows(expected)
    plain, solved = expected.hvp(v), expected.inverse_hvp(v)
    matrix = torch.randn(80, 80, generator=torch.Generator().manual_seed(2))
    matrix = matrix @ matrix.mT / 80 + torch.eye(80)
    answers = [solve(matrix, v[:, :80], rtol=1e-4)[0] for solve in (solvers.cg, solvers.minres)]

    entered = []

    @contextlib.contextmanager
    def candidate() -> Iterator[None]:
        entered.append(None)
        with LOWER[lower]():
            yield

    monkeypatch.setattr(products, "_choice", None)
    monkeypatch.setattr(products, "_refused_at_once", lambda: None)
    monkeypatch.setattr(products, "_onednn", candidate)
    module = problem()
    assert torch.equal(module.hvp(v), plain)
    measuring = len(entered)
    assert measuring, "nothing was measured"
    assert torch.equal(module.inverse_hvp(v), solved)
    for solve, answer in zip((solvers.cg, solvers.minres), answers, strict=True):
        assert torch.equal(solve(matrix, v[:, :80], rtol=1e-4)[0], answer)
    assert len(entered) == measuring
    choice = products.choice()
    assert not choice.onednn
    assert "have an error of" in choice.why  # and not: it is slower
    assert choice.why in str(backend_info())


def test_lower_precision_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sessions' products do come from the candidate, if it is taken: so the test above can fail."""
    monkeypatch.setattr(products, "_choice", NO)
    module = problem()
    v = rows(module)
    plain = module.hvp(v)
    monkeypatch.setattr(products, "_choice", YES)
    monkeypatch.setattr(products, "_onednn", lambda: Rounding(lambda t: 1.25 * t))
    assert not torch.equal(problem().hvp(v), plain)


def test_the_bound_is_between_float32_and_what_is_refused() -> None:
    """In all shapes: above the least favourable order of float32's own sums, below lower precision."""
    for shape, it in products.measured(LOWER["two parts in bfloat16"]).items():
        assert it.error > 2 * it.bound, shape
        assert it.error_of_torch < it.bound, shape
    for shape, it in products.measured(LOWER["TF32"]).items():
        assert it.error > 100 * it.bound, shape
    generator = torch.Generator().manual_seed(3)
    for inner in (16, 96, 785, 2048):
        a, b = (torch.randn(400, inner, generator=generator) for _ in range(2))
        exact, sums = (a.double() * b.double()).sum(dim=1), torch.zeros(400)
        for i in range(inner):  # one after the other: torch.sum adds in pairs
            sums += a[:, i] * b[:, i]
        assert (sums.double() - exact).norm() / exact.norm() < products._bound(inner) / 1.3


def test_it_is_taken_if_it_is_as_exact_and_faster() -> None:
    found = products.measured(contextlib.nullcontext)
    same = {shape: dataclasses.replace(it, seconds=1.0, seconds_of_torch=1.0) for shape, it in found.items()}
    assert all(it.error == it.error_of_torch for it in found.values())  # the candidate is torch itself
    twice = {shape: dataclasses.replace(it, seconds=0.5) for shape, it in same.items()}
    assert products.judged(twice).onednn
    assert "2.00x torch's default at the same float32 error" in str(products.judged(twice))
    assert not products.judged(same).onednn
    assert "no gain" in str(products.judged(same))
    for shape in twice:
        slow = twice | {shape: dataclasses.replace(twice[shape], seconds=1.6)}
        assert not products.judged(slow).onednn
        wrong = twice | {shape: dataclasses.replace(twice[shape], error=float("nan"))}
        assert not products.judged(wrong).onednn


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_a_torch_without_the_setting(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def candidate() -> Any:
        raise error("no such setting")

    monkeypatch.setattr(products, "_choice", None)
    monkeypatch.setattr(products, "_refused_at_once", lambda: None)
    monkeypatch.setattr(products, "_onednn", candidate)
    assert products.choice() == products.Choice(False, "oneDNN could not be measured: no such setting")


def test_what_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_choice", None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert "TF32" in products.choice().why
    monkeypatch.setattr(products, "_choice", None)
    monkeypatch.setenv("TORCH_INFLUENCE_BACKEND", "reference")
    assert products.choice() == products.Choice(False, "TORCH_INFLUENCE_BACKEND=reference asks for plain torch")


# -- where it is taken ------------------------------------------------------------------------------------------------


@pytest.fixture
def _taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_choice", YES)


@pytest.mark.parametrize("onednn", [True, False])
def test_products_against_float64(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five products of matrices follow one another, of sums of up to 150 terms, each with float32's error."""
    monkeypatch.setattr(products, "_choice", YES if onednn and products._refused_at_once() is None else NO)
    module = problem()
    v = rows(module)
    exact = problem(torch.float64).hvp(v.double())
    assert float((module.hvp(v) - exact).norm() / exact.norm()) < 5 * products._bound(150)


CALLS: dict[str, Callable[[], Any]] = {
    "layers": lambda: problem().hvp(torch.ones(1, 2604)),
    "linear head": lambda: problem(model=nn.Linear(60, 20)).hvp(torch.ones(8, 1220)),
    "cg": lambda: solvers.cg(torch.eye(100), torch.ones(50, 100)),
    "minres": lambda: solvers.minres(torch.eye(100), torch.ones(50, 100)),
}


def native() -> None:
    """The ops' own calls of torch's products."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=generator)
    linear_curvature_product(x, torch.randn(20, 640, generator=generator), x[:, :10].softmax(dim=1))
    grad_dot(x.view(10, 50, 64), x.view(10, 50, 64)[:, :, :32].contiguous(), torch.ones(20, 2048))


@pytest.mark.usefixtures("_taken")
@needs_onednn
@pytest.mark.parametrize("call", CALLS)
def test_sessions_and_solvers_multiply_by_it(call: str, capfd: pytest.CaptureFixture[str]) -> None:
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        CALLS[call]()
    assert "matmul" in capfd.readouterr().out
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        torch.ones(100, 100) @ torch.ones(100, 100)
    assert "matmul" not in capfd.readouterr().out


@pytest.mark.usefixtures("_taken")
@needs_onednn
@pytest.mark.skipif(not backend_info().ops, reason=f"no native ops: {backend_info().cpu}")
def test_native_ops_multiply_by_it(capfd: pytest.CaptureFixture[str]) -> None:
    with switches.quick_products(), torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        native()
    assert capfd.readouterr().out.count("cpu,matmul") >= 3  # two of the curvature, one of each order of grad_dot


@pytest.mark.usefixtures("_taken")
@needs_onednn
def test_settings_can_be_read_inside_and_are_put_back() -> None:
    before = settings()
    seen: list[dict[str, Any]] = []
    module = problem(model=around(lambda: seen.append(settings())))
    module.inverse_hvp(rows(module, 1))
    assert {inside["oneDNN, products"] for inside in seen} == {"bf16"}
    assert settings() == before
    with switches.quick_products():
        with switches.quick_products():
            assert settings() == seen[0]
        assert settings() == seen[0]
        assert backend_info().products == "oneDNN, a test says so"  # and not: the user has set something
    torch.backends.fp32_precision = "ieee"  # what inherits it does so again
    assert torch.backends.mkldnn.matmul.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    torch.backends.fp32_precision = "none"


@pytest.mark.usefixtures("_taken")
@needs_onednn
def test_settings_are_put_back_after_an_exception() -> None:
    def fail() -> None:
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        problem(model=around(fail)).hvp(torch.ones(2604))
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.usefixtures("_taken")
@needs_onednn
def test_settings_are_put_back_by_the_last_thread() -> None:
    first_is_out, second_is_in, seen = threading.Event(), threading.Event(), []

    def second() -> None:
        with switches.quick_products():
            second_is_in.set()
            assert first_is_out.wait(60)
            seen.append(settings())

    thread = threading.Thread(target=second, daemon=True)
    with switches.quick_products():
        thread.start()
        assert second_is_in.wait(60)
        inside = settings()
    between = settings()
    first_is_out.set()
    thread.join(60)
    assert seen == [inside] == [between]
    assert torch.get_float32_matmul_precision() == "highest"


def test_two_threads_choose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measuring(candidate: Any) -> Any:
        measured.append(None)
        raise RuntimeError("never mind")

    monkeypatch.setattr(products, "_choice", None)
    monkeypatch.setattr(products, "_refused_at_once", lambda: None)
    monkeypatch.setattr(products, "measured", measuring)
    threads = [threading.Thread(target=products.choice, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(measured) == 1


# -- the user's own settings ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextlib.contextmanager
def older(precision: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


backends = torch.backends
OWN: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "older: high": lambda: older("high"),
    "older: medium": lambda: older("medium"),
    "older: highest, said": lambda: older("highest"),
    "all: ieee": lambda: setting(backends, "fp32_precision", "ieee"),
    "all: tf32": lambda: setting(backends, "fp32_precision", "tf32"),
    "oneDNN's products: ieee": lambda: setting(backends.mkldnn.matmul, "fp32_precision", "ieee"),
    "oneDNN's products: bf16": lambda: setting(backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "cuBLAS: ieee": lambda: setting(backends.cuda.matmul, "fp32_precision", "ieee"),
    "no oneDNN": lambda: setting(backends.mkldnn, "enabled", False),
}


def raw() -> list[Any]:
    """The settings one by one: a mix of the user's can be unreadable for torch itself."""
    read = torch._C._get_fp32_precision_getter
    return [read(*place) for place in products._SETTINGS.values()] + [torch.backends.mkldnn.enabled]


@pytest.mark.usefixtures("_taken")
@pytest.mark.parametrize("own", OWN)
def test_the_users_own_settings_win(own: str) -> None:
    inside: list[list[Any]] = []
    with OWN[own]():
        before = raw()
        module = problem(model=around(lambda: inside.append(raw())))
        module.hvp(rows(module, 1))
        solvers.cg(torch.eye(3), torch.ones(1, 3))
        assert "torch's default, because torch.backends." in backend_info().products
        assert raw() == before
        assert inside
        assert all(seen == before for seen in inside)


@pytest.mark.usefixtures("_taken")
@needs_onednn
def test_what_a_forward_sets_stays() -> None:
    with older("highest"):  # which puts back all at its end
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
        problem(model=around(lambda: torch.set_float32_matmul_precision("high"))).hvp(torch.ones(2604))
        assert torch.get_float32_matmul_precision() == "high"


def test_nothing_is_measured_for_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float64
    monkeypatch.setattr(products, "_choice", None)
    problem(dtype).hvp(torch.ones(2604, dtype=dtype))
    module().hvp(torch.ones(43, dtype=dtype))
    solvers.cg(torch.eye(3, dtype=dtype), torch.ones(3, dtype=dtype))
    assert products._choice is None


@pytest.mark.parametrize(("size", "measured"), [(43, True), (44, False)])
def test_nothing_is_measured_for_few_parameters(size: int, measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for act in (
        lambda: module(model=network(torch.float32), train_loader=loader(dtype=torch.float32)).hvp(torch.ones(43)),
        lambda: solvers.cg(torch.eye(43), torch.ones(43)),
    ):
        monkeypatch.setattr(products, "_choice", None)
        monkeypatch.setattr(products, "LEAST_SIZE", size)
        act()
        assert (products._choice is not None) == measured


def test_import_measures_nothing() -> None:
    program = "import torch_influence; from torch_influence import products; print(products._choice)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert found.stdout == "None\n", found.stderr
