"""The main job on real data: which handwritten digits carry wrong labels, and which ones caused a wrong prediction?

Run with ``python -m torch_influence demo``. Needs the extra ``[demo]``: scikit-learn for the data, matplotlib for the
picture.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import AutogradInfluenceModule, BaseObjective, CGInfluenceModule, TopInfluences, plot

WEIGHT_DECAY = 1e-3
DAMP = 1e-3


class DigitsObjective(BaseObjective):
    """Softmax classification with weight decay."""

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def train_regularization(self, params: Tensor) -> Tensor:
        return 0.5 * WEIGHT_DECAY * params.square().sum()

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


def load_digits_with_flips(flip: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loads images and labels for training and testing, and makes some training labels wrong; tells which."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    x = torch.tensor(images[order] / 16.0, dtype=torch.float32, device="cpu")
    y = torch.tensor(labels[order], dtype=torch.int64, device="cpu")
    n = 1200
    flipped = torch.zeros(n, dtype=torch.bool, device="cpu")
    flipped[rng.choice(n, round(flip * n), replace=False)] = True
    wrong = (y[:n] + torch.tensor(rng.integers(1, 10, size=n), device="cpu")) % 10
    return x[:n], torch.where(flipped, wrong, y[:n]), x[n:], y[n:], flipped


def train(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Trains a small network to a minimum of its regularised loss with L-BFGS."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 16, device="cpu"), nn.Tanh(), nn.Linear(16, 10, device="cpu"))
    params = list(model.parameters())
    optimizer = torch.optim.LBFGS(params, max_iter=600, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + 0.5 * WEIGHT_DECAY * sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def report_ranking(name: str, scores: Tensor, flipped: Tensor) -> None:
    """Prints one line: how well the largest scores find the flipped labels."""
    from sklearn.metrics import roc_auc_score

    found = flipped[scores.argsort(descending=True)].float()
    count = int(flipped.sum())
    precisions = "".join(f"{float(found[:k].mean()):>10.2f}" for k in (count // 4, count // 2, count))
    print(f"  {name:<24}{roc_auc_score(flipped, scores):>8.3f}{precisions}")


def draw(path: Path, data: dict[str, Any], top: TopInfluences) -> None:
    """Draws misclassified test digits, each with its most helpful and most harmful training digits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    queries = data["queries"]
    figure = plot.examples(
        data["test_x"][queries].reshape(-1, 8, 8),
        data["train_x"].reshape(-1, 8, 8),
        top,
        query_labels=[f"is {data['test_y'][q]}, taken for {data['predicted'][q]}" for q in queries],
        train_labels=[
            f"label {y}" + (" (wrong)" if flipped else "")
            for y, flipped in zip(data["train_y"], data["flipped"].tolist(), strict=True)
        ],
        highlight=set(data["flipped"].nonzero().flatten().tolist()),
        cmap="gray_r",
    )
    figure.suptitle("Why are these test digits misclassified?  Red: a training label made wrong.", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m torch_influence demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("influence_digits.png"), help="the picture to write")
    parser.add_argument("--flip", type=float, default=0.1, help="share of training labels made wrong (default 0.1)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not 0 < options.flip < 1:
        parser.error(f"--flip: expected a share between 0 and 1, got {options.flip}")
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        parser.exit(1, f"the demo needs {error.name}: pip install 'torch-influence[demo]'\n")
    start = time.perf_counter()

    train_x, train_y, test_x, test_y, flipped = load_digits_with_flips(options.flip, options.seed)
    model = train(train_x, train_y, options.seed)
    with torch.no_grad():
        predicted = model(test_x).argmax(dim=1)
        losses = F.cross_entropy(model(train_x), train_y, reduction="none")
    wrong = (predicted != test_y).nonzero().flatten().tolist()
    d = sum(p.numel() for p in model.parameters())
    print(
        f"Digits: {len(train_x)} for training, {int(flipped.sum())} of them with a wrong label; a network of {d} "
        f"parameters gets {len(test_x) - len(wrong)} of {len(test_x)} test digits right "
        f"({time.perf_counter() - start:.1f} s)."
    )

    setting: dict[str, Any] = {
        "model": model,
        "objective": DigitsObjective(),
        "train_loader": DataLoader(TensorDataset(train_x, train_y), batch_size=1200),
        "test_loader": DataLoader(TensorDataset(test_x, test_y), batch_size=400),
        "device": torch.device("cpu"),
        "damp": DAMP,
        "progress": True,
    }
    began = time.perf_counter()
    module = AutogradInfluenceModule(**setting)
    scores = module.influence_matrix(test_idxs=wrong)
    print(f"\nInfluence of every training digit on the {len(wrong)} misclassified ones, with the exact Hessian:")
    print(f"  {time.perf_counter() - began:.1f} s. {str(module.last_report).splitlines()[0]}")
    began = time.perf_counter()
    iterative = CGInfluenceModule(**setting, rtol=1e-3)
    difference = float((iterative.influence_matrix(test_idxs=wrong) - scores).norm() / scores.norm())
    print(f"The same without forming a matrix, relative difference {difference:.0e}:")
    print(f"  {time.perf_counter() - began:.1f} s. {str(iterative.last_report).splitlines()[0]}")

    began = time.perf_counter()
    self_influence = module.self_influences()
    print("Self-influence of every training digit:")
    print(f"  {time.perf_counter() - began:.1f} s. {str(module.last_report).splitlines()[0]}")
    count = int(flipped.sum())
    print(
        f"\nDo the largest find the wrong labels?{'AUC':>7}"
        + "".join(f"{f'top {k}':>10}" for k in (count // 4, count // 2, count))
    )
    report_ranking("by self-influence", self_influence, flipped)
    report_ranking("by training loss", losses, flipped)
    print(f"  {'at random':<24}{0.5:>8.3f}" + f"{options.flip:>10.2f}" * 3)

    shown = {"queries": wrong[:8], "flipped": flipped, "predicted": predicted.tolist()}
    shown |= {"train_x": train_x, "train_y": train_y.tolist(), "test_x": test_x, "test_y": test_y.tolist()}
    draw(options.out, shown, module.influence_matrix(test_idxs=wrong[:8], top_k=3))
    print(f"\nPicture: {options.out.resolve()}\nTook {time.perf_counter() - start:.1f} s in all.")
    return 0
