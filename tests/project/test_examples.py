"""Each example runs as a user would run it, and its numbers are those of dense float64 solves and of refits."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import importlib.util
import io
import re
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    assert_close,
    dense_gauss_newton,
    dense_hessian,
    example_gradients,
    leave_one_out,
    loader_batches,
    query_gradients,
    refit_linear,
    refit_logistic,
)
from scipy import stats
from torch import Tensor
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[2]
RTOL = 1e-11
OPTIONAL = {"transformer": "transformers", "curvlinops_solver": "curvlinops"}  # what is needed beside the dev extra
BY_CHANCE = 1e-6  # how likely a random ranking may find as many planted examples


def run(name: str, *flags: object) -> str:
    """What it prints, run as a user runs it; but in this process, since to import torch takes longer than most do."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for of_others in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", of_others)  # as by default
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


@functools.cache
def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exact(module: Any) -> tuple[Tensor, Tensor, float, float]:
    """Scores [n, q], self-influences [n], condition number, and the size of what is added up in a score."""
    model = copy.deepcopy(module.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in module.params_names)
    dense = dense_gauss_newton if module.gnh else dense_hessian
    curvature = dense(model, module.objective, loader_batches(module.train_loader))
    matrix = curvature + module.damp * torch.eye(len(curvature), dtype=torch.float64)
    g = example_gradients(model, module.objective, module.train_loader)
    b = query_gradients(model, module.objective, module.test_loader)
    s, own = torch.linalg.solve(matrix, b.mT).mT, torch.linalg.solve(matrix, g.mT).mT
    size = float(g.norm(dim=1).max() * torch.cat([s, own]).norm(dim=1).max()) / len(g)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert eigenvalues[0] > 0
    return g @ s.mT / len(g), (g * own).sum(dim=1) / len(g), float(eigenvalues[-1] / eigenvalues[0]), size


def check(module: Any, *others: Any) -> None:
    """The module of an example, and others that are to agree with it, against dense solves in double precision."""
    scores, own, condition, size = exact(module)
    d = len(module.flat_parameters())
    close = functools.partial(
        assert_close, operations=len(own) * d, condition=condition, scale=size, inherent=2 * RTOL * condition
    )
    for each in (module, *others):
        each.rtol = RTOL
        close(each.influence_matrix(), scores)
        close(each.self_influences(), own)


def double(*sets: TensorDataset) -> list[TensorDataset]:
    return [TensorDataset(*(t.double() if t.is_floating_point() else t for t in dataset.tensors)) for dataset in sets]


def not_by_chance(found: int, among: int, planted: int, n: int) -> None:
    assert stats.hypergeom.sf(found - 1, n, planted, among) < BY_CHANCE, f"{found} of {planted} among {among} of {n}"


def test_every_example_is_tested_and_says_what_one_learns() -> None:
    for path in set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / "quickstart.py"}:  # test_readme has that
        assert f"test_{path.stem}" in globals()
        assert "What one learns: " in (ast.get_docstring(ast.parse(path.read_text())) or "")


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, OPTIONAL[name], None)
    with pytest.raises(SystemExit, match=rf"^this example needs {OPTIONAL[name]}: pip install [\w-]+$"):
        run(name)


def test_mislabelled_digits(tmp_path: Path) -> None:
    n, planted, picture = 300, 30, tmp_path / "curves.png"
    output = run("mislabelled_digits", "--count", n, "--picture", picture)
    assert f"{planted} of {n} labels are wrong" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in ("self-influence", "harm to clean digits"):
        line = re.search(rf"^{name} +(.*)$", output, flags=re.MULTILINE)
        assert line is not None
        numbers = [float(number) for number in re.findall(r"\d\.\d\d", line.group(1))]
        for k, precision, recall in zip((15, 30, 60, 90), numbers[::2], numbers[1::2], strict=True):
            assert precision * k == pytest.approx(recall * planted, abs=0.005 * (k + planted))  # both rounded
            not_by_chance(round(precision * k), k, planted, n)
    example = load("mislabelled_digits")
    train, clean, wrong = example.digits_with_wrong_labels(100, 0.1, 0)
    train, clean = double(train, TensorDataset(*clean[:20]))
    module = example.module_for(example.fit(train), train, clean)
    check(module)
    scores = example.suspicion(module, train, clean)
    precision, recall = example.precision_and_recall(scores["self-influence"], wrong)
    for k in (1, 10, 100):
        found = int(wrong[scores["self-influence"].topk(k).indices].sum())
        assert (float(precision[k - 1]), float(recall[k - 1])) == pytest.approx((found / k, found / 10))


def refit_changes(objective: Any, train: Any, test: Any) -> Tensor:
    """The mean test loss after each refit, less that before, from formulas."""
    (a, b), (at, bt) = ([torch.stack(column) for column in zip(*part, strict=True)] for part in (train, test))
    l2 = load("custom_objective").L2
    if type(objective).__name__ == "Ranking":  # a logistic regression on differences, all of one class
        refit = functools.partial(refit_logistic, l2=l2)
        x, y, xt = a - b, torch.ones(len(a), dtype=a.dtype), at - bt
        thetas = torch.cat([refit(x, y)[None], leave_one_out(refit, x, y)])
        losses = torch.nn.functional.softplus(-thetas @ xt.mT).mean(dim=1)
        return losses[1:] - losses[0]
    x, xt = (torch.cat([part, torch.ones(len(part), 1, dtype=a.dtype)], dim=1) for part in (a, at))
    spreads = objective.spread.double() if hasattr(objective, "spread") else torch.ones(1, dtype=a.dtype)
    total = torch.zeros(len(x), dtype=a.dtype)
    for y, yt, spread in zip(b.reshape(len(x), -1).mT, bt.reshape(len(xt), -1).mT, spreads, strict=True):
        refit = functools.partial(refit_linear, l2=l2 * float(spread) ** 2)
        thetas = torch.cat([refit(x, y)[None], leave_one_out(refit, x, y)])
        losses = 0.5 * ((thetas @ xt.mT - yt) / spread).square().mean(dim=1)
        total += losses[1:] - losses[0]
    return total


def test_custom_objective() -> None:
    n, example = 200, load("custom_objective")
    blocks = run("custom_objective").strip().split("\n\n")
    for block, (start, objective, train, test) in zip(blocks, example.problems(n), strict=True):
        assert block.startswith(f"{type(objective).__name__}:")
        assert block.endswith("passed (12 of 12 checks)")
        module = example.module_for(example.fit(start, objective, train), objective, train, test)
        check(module)
        predicted, actual = module.influences(range(n), range(len(test))), refit_changes(objective, train, test)
        printed = re.findall(r"^ +(\d+) +([+-]\S+) +([+-]\S+)$", block, flags=re.MULTILINE)
        assert len(printed) == 4
        for i, said, happened in printed:  # six digits are printed; fits end at gradients of 1e-10
            assert float(said) == pytest.approx(float(predicted[int(i)]), abs=0.51e-6)
            assert float(happened) == pytest.approx(float(actual[int(i)]), abs=0.51e-6)
        assert stats.pearsonr(predicted, actual).statistic > 0.99


def test_last_layer() -> None:
    example = load("last_layer")
    torch.manual_seed(0)
    train, test = double(*example.digits(60))
    test = TensorDataset(*test[:5])
    model = example.pretrained(*train.tensors, epochs=2)
    example.fit_head(model.head, example.features_of(model, train))
    head, whole = example.both_ways(model, train, test)
    assert whole.params_names == ("head.weight", "head.bias")
    check(whole, head)
    assert all(p.requires_grad for p in model.parameters())
    output = run("last_layer", "--count", 300)
    assert output.count("s; curvature: ") == 2
    said = re.search(r"relative to the largest score: (\S+)$", output, flags=re.MULTILINE)
    assert said is not None
    assert float(said.group(1)) <= 1e-2  # two solutions in single precision, each to 1e-5 times the condition number
    assert len(re.findall(r"helped most by digits \[\d+, \d+, \d+\]: labels", output)) == 2


def dogfish_file(path: Path, n: int = 60, tests: int = 8) -> int:
    """As Koh and Liang's, smaller; the returned training image is test image 0 with the other label."""
    rng = np.random.default_rng(0)
    labels, test_labels = rng.integers(2, size=n).astype(float), rng.integers(2, size=tests).astype(float)
    patterns = rng.uniform(-0.3, 0.3, size=(2, 12, 12, 3))
    images, test_images = (
        (patterns[y.astype(int)] + rng.uniform(-0.7, 0.7, size=(len(y), 12, 12, 3))) for y in (labels, test_labels)
    )
    images[17], labels[17] = test_images[0], 1 - test_labels[0]
    arrays = {"X_train": images, "Y_train": labels, "X_test": test_images, "Y_test": test_labels}
    nothing = {"X_valid": np.zeros((0, 12, 12, 3)), "Y_valid": np.zeros(0)}
    np.savez_compressed(path, **arrays, **nothing)
    return 17


def test_dogfish(tmp_path: Path) -> None:
    file, picture = tmp_path / "dataset_dog-fish_train-30_test-4.npz", tmp_path / "dogfish.png"
    planted = dogfish_file(file)
    output = run("dogfish", file, "--queries", 8, "--picture", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = re.findall(
        r"^test image (\d+) \((\w+)\)\n"
        r"  helped most by training image (\d+) \((\w+)\): \S+\n"
        r"  harmed most by training image (\d+) \((\w+)\): -\S+$",
        output,
        flags=re.MULTILINE,
    )
    assert sorted(int(row[0]) for row in rows) == list(range(8))
    true, *_, harmful, given = next(row[1:] for row in rows if row[0] == "0")
    assert (int(harmful), {true, given}) == (planted, {"dog", "fish"})

    example, stored = load("dogfish"), np.load(file)
    sets = [example.embedded(stored[f"X_{p}"], stored[f"Y_{p}"], example.shrunk) for p in ("train", "test")]
    image, pooled = stored["X_train"][23], sets[0].tensors[0][23]  # of the second part; windows of 2 x 2 pixels
    ends = [image[:2, :2, 0].mean(), image[-2:, -2:, 2].mean()]
    assert_close(pooled[[0, -1]], torch.tensor(ends), operations=4, scale=1.0)
    train, test = double(*sets)
    module = example.module_for(example.fit(train), train, test)
    check(module)
    scores = module.influence_matrix()
    worst, top = example.explained(module, test, 8)
    for row, q in enumerate(worst.tolist()):
        assert int(top.helpful.indices[row, 0]) == int(scores[:, q].argmax())
        assert int(top.harmful.indices[row, 0]) == int(scores[:, q].argmin())


def test_transformer() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    n, planted = 150, 8
    output = run("transformer", "--count", n, "--wrong", planted)
    found = re.search(r"among the (\d+) largest self-influences: (\d+) of (\d+)", output)
    assert found is not None
    among, right, of = map(int, found.groups())
    assert (among, of) == (2 * planted, planted)
    not_by_chance(right, among, planted, n)
    assert "passed (8 of 8 checks)" in output
    example = load("transformer")
    data, test = example.sentences(24, 2), example.sentences(3, 0, seed=1)
    model = example.small_model(hidden=8)
    example.train(model, data, epochs=2)
    check(example.module_for(model.double(), data, test))
    check(example.module_for(model, data, test, params="classifier.*"))


def test_curvlinops_solver() -> None:
    pytest.importorskip("curvlinops", reason="curvlinops is not installed: make test installs it")
    rtol, hidden, queries = 1e-8, 6, 4
    output = run("curvlinops_solver", "--rtol", rtol, "--hidden", hidden, "--queries", queries)
    example = load("curvlinops_solver")
    curvature, identity, rows = example.problem(hidden, queries)
    matrix = (curvature + example.DAMP * identity) @ torch.eye(rows.shape[1], dtype=rows.dtype)
    condition = float(torch.linalg.cond(matrix))
    assert f"{queries} right-hand sides, {len(matrix)} parameters" in output
    table = {
        name.strip(): numbers for name, *numbers in re.findall(r"^([^\d\n]+?) +(\S+e\S+) +(\S+e\S+)", output, re.M)
    }
    assert table.keys() == {"curvlinops' CG", "cg", "block_cg"}
    for name, (residual, error) in table.items():  # theirs is the mean of the rows' residuals
        allowed = rtol * (queries if name == "curvlinops' CG" else 1)
        assert float(residual) <= 1.05 * allowed  # two digits are printed
        assert float(error) <= 1.05 * allowed * condition
    expected = torch.linalg.solve(matrix, rows.mT).mT
    found = example.theirs(curvature + example.DAMP * identity, rows, rtol)
    size = float(expected.norm(dim=1).max())
    assert_close(found, expected, operations=0, scale=size, inherent=queries * rtol * condition)


def test_lora() -> None:
    n, planted = 300, 8
    output = run("lora", "--count", n, "--wrong", planted)
    before, after = map(float, re.findall(r"(\d\.\d\d) (?:before|after)", output))
    assert after > before
    found = re.search(rf"among the {planted} largest self-influences: (\d+) of {planted}", output)
    assert found is not None
    not_by_chance(int(found.group(1)), planted, planted, n)
    means = [float(number) for number in re.findall(r"[+-]\d\.\d{5}", output)]
    assert means[0] < 0 < means[1]
    example = load("lora")
    model, data, test, _ = example.adapted(20, 2, steps=30)
    data, test = double(data, TensorDataset(*test[:5]))
    module = example.module_for(model.double(), data, test)
    assert len(module.params_names) == 6
    assert all("lora_" in name for name in module.params_names)
    check(module)
