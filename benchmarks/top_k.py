"""The 10 most helpful and most harmful of 1,000,000 training examples for each of 100 queries, and the memory of it.

    python benchmarks/top_k.py [--n N] [--queries Q] [--k K] [--solver direct|cg] [--json PATH]

A softmax head on features of width 64, trained by some steps of LBFGS. Memory is the peak of the process beyond what
there was before: model, features and labels. On some of the examples the rankings are compared with those of their
whole matrix.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import harness
from workloads import Classification

from torch_influence import AutogradInfluenceModule, BaseInfluenceModule, CGInfluenceModule

FEATURES, CLASSES, L2, DAMP = 64, 10, 1e-3, 1e-3
LIMIT = 2 * 2**30  # bytes beyond the features
COMPARED = 20_000  # examples whose whole matrix is formed


def problem(n: int, queries: int) -> tuple[nn.Linear, TensorDataset, TensorDataset]:
    """Decaying features, labels of a noisy teacher, a head close to its minimum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n + queries, FEATURES, generator=generator)
    x *= torch.arange(1.0, FEATURES + 1) ** -0.5
    teacher = torch.randn(FEATURES, CLASSES, generator=generator)
    y = torch.empty(n + queries, dtype=torch.int64)
    for part, labels in zip(x.split(2**16), y.split(2**16), strict=True):
        noise = torch.rand(len(part), CLASSES, generator=generator).clamp_(min=1e-9).log_().neg_().log_().neg_()
        labels.copy_((part @ teacher + noise).argmax(dim=1))
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * L2 * sum(p.square().sum() for p in model.parameters())
        loss = loss + F.cross_entropy(model(x[:50_000]), y[:50_000])  # enough of the data
        loss.backward()
        return loss

    optimizer.step(closure)
    return model, TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])


def build(work: tuple[nn.Linear, TensorDataset, TensorDataset], solver: str) -> BaseInfluenceModule:
    model, train, test = work
    data = DataLoader(train, batch_size=4096), DataLoader(test, batch_size=100)
    objective = Classification(F.cross_entropy, L2)
    if solver == "direct":
        return AutogradInfluenceModule(model, objective, *data, "cpu", DAMP)
    return CGInfluenceModule(model, objective, *data, "cpu", DAMP, rtol=1e-4)


def run(build: Callable[[], BaseInfluenceModule], k: int) -> tuple[BaseInfluenceModule, dict[str, Any]]:
    """A new module's first answer: seconds of its parts, and the peak of memory by the end of each."""
    steps: dict[str, Any] = {}
    modules: list[BaseInfluenceModule] = []

    def step(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        steps[name] = {"seconds": time.perf_counter() - start, "peak_bytes": harness.resident("VmHWM")}
        return result

    def all_steps() -> None:
        steps["before"] = {"seconds": 0.0, "peak_bytes": harness.resident("VmRSS")}
        module = step("construct", build)
        step("explain: read data, capture, probe", lambda: module.explain(100))
        rows = step("solve", module.stests)
        module.stests = lambda test_idxs=None: rows
        step("scores and ranking", lambda: module.influence_matrix(top_k=k))
        modules.append(module)

    extra = harness.extra_memory(all_steps, "cpu")
    return modules[0], {"steps": steps, "extra_bytes": extra}


def agree(module: BaseInfluenceModule, n: int, k: int) -> bool:
    """Whether rankings of some of the examples are those of their matrix: the same scores, of these examples."""
    some = range(0, n, max(1, n // COMPARED))
    matrix, top = module.influence_matrix(some).mT, module.influence_matrix(some, top_k=k)
    return all(
        torch.equal(ranking.values, matrix.topk(k, largest=largest).values)
        and torch.equal(ranking.values, matrix.gather(1, ranking.indices // some.step))
        for ranking, largest in ((top.helpful, True), (top.harmful, False))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1_000_000, help="training examples")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--k", type=int, default=10, help="examples to find on either side")
    parser.add_argument("--solver", choices=["direct", "cg"], default="direct")
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    options = parser.parse_args()

    work = problem(options.n, options.queries)
    module, record = run(lambda: build(work, options.solver), options.k)
    extra, before = record["extra_bytes"], record["steps"]["before"]["peak_bytes"]
    print(
        f"top {options.k} of {options.n:,} x {options.queries}, {FEATURES} features, {CLASSES} classes, "
        f"{options.solver}; features and labels {sum(t.nbytes for t in work[1].tensors) / 2**20:,.0f} MiB, "
        f"the matrix would be {4 * options.n * options.queries / 2**20:,.0f} MiB"
    )
    for name, step in record["steps"].items():
        print(f"  {name:<36}{step['seconds']:>8.2f} s, peak {(step['peak_bytes'] - before) / 2**20:>6,.0f} MiB")
    print(f"  extra memory {extra / 2**20:,.0f} MiB, at most {LIMIT / 2**20:,.0f} wanted: {extra < LIMIT}")
    print(module.explain(options.queries))
    record["agrees"] = agree(module, options.n, options.k)
    print(f"  rankings of a part are those of its matrix: {record['agrees']}")
    if options.json:
        sizes = {"n": options.n, "queries": options.queries, "k": options.k, "features": FEATURES, "classes": CLASSES}
        record = {"provenance": harness.provenance(), "solver": options.solver, "damp": DAMP, **sizes, **record}
        harness.write(options.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
