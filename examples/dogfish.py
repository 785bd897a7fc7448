"""Dogs and fish: the experiment of Koh and Liang (2017), on their own file.

What one learns: the whole way from images to influential images: features from a network trained by others, a logistic
regression trained to its minimum, and for the worst test images the training images that helped and harmed most.

The file is `dataset_dog-fish_train-900_test-300.npz` of their release (https://github.com/kohpangwei/influence-release
says where to get it): X_train, X_test of images [n, 299, 299, 3] with values from -1 to 1, Y_train, Y_test with 0 for a
dog and 1 for a fish. `--backbone inception_v3`, or another classifier of torchvision, gives its pretrained features
(needs torchvision, which downloads the weights once). Without it the features are the pixels, shrunk to 8 x 8: enough
to see the code run.

    python examples/dogfish.py dataset_dog-fish_train-900_test-300.npz --backbone inception_v3 --picture dogfish.png
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import BaseObjective, InfluenceModule

L2 = 0.001  # their weight decay; here of the bias, too
NAMES = "dog", "fish"


class Objective(BaseObjective):
    def train_outputs(self, model, batch):
        return model(batch[0]).squeeze(1)

    def train_loss_on_outputs(self, outputs, batch):
        return F.binary_cross_entropy_with_logits(outputs, batch[1])

    def train_regularization(self, params):
        return 0.5 * L2 * params.square().sum()

    def test_loss(self, model, params, batch):
        return self.train_loss_on_outputs(self.train_outputs(model, batch), batch)


def backbone(name):
    """A pretrained classifier of torchvision without its last layer, and in front of it the scaling that it expects."""
    from torchvision.models import get_model

    network = get_model(name, weights="DEFAULT")
    last = [path for path, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)][-1]
    network.set_submodule(last, torch.nn.Identity())
    mean, std = torch.tensor([[[0.485]], [[0.456]], [[0.406]]]), torch.tensor([[[0.229]], [[0.224]], [[0.225]]])
    network.eval()
    return lambda images: network(((images + 1) / 2 - mean) / std)


def shrunk(images):
    return F.adaptive_avg_pool2d(images, 8).flatten(1)


@torch.no_grad()
def embedded(images, labels, features):
    """Features of images [n, height, width, 3], a few at a time, and labels as a loss of logits wants them."""
    parts = [images[i : i + 20].transpose(0, 3, 1, 2) for i in range(0, len(images), 20)]
    x = torch.cat([features(torch.tensor(part, dtype=torch.float32)) for part in parts])
    return TensorDataset(x, torch.tensor(labels, dtype=x.dtype).flatten())


def fit(train):
    x, y = train.tensors
    model = torch.nn.Linear(x.shape[1], 1).to(x.dtype)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1000, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(x).squeeze(1), y)
        loss = loss + 0.5 * L2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def module_for(model, train, test):
    return InfluenceModule(model, Objective(), DataLoader(train, 256), DataLoader(test, 256), "cpu", damp=1e-3)


def explained(module, test, queries):
    """The worst test images; and for each of them the training images that helped and harmed it most, with scores."""
    x, y = test.tensors
    with torch.no_grad():
        losses = F.binary_cross_entropy_with_logits(module.model(x).squeeze(1), y, reduction="none")
    worst = losses.topk(queries).indices
    return worst, module.influence_matrix(test_idxs=worst, top_k=1)


def draw(path, rows):
    from matplotlib.figure import Figure

    columns = len(rows[0][1])
    axes = (figure := Figure(figsize=(2 * columns, 6.5))).subplots(len(rows), columns, squeeze=False)
    for line, (title, images, labels, scores) in zip(axes, rows, strict=True):
        for cell, image, label, score in zip(line, images, labels, scores, strict=True):
            cell.imshow((image + 1) / 2)
            cell.set_title(f"{title} {NAMES[int(label)]}\n{score}", fontsize=8)
            cell.axis("off")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the .npz file")
    parser.add_argument("--backbone", help="a classifier of torchvision, such as inception_v3")
    parser.add_argument("--queries", type=int, default=5, help="the worst so many test images (default 5)")
    parser.add_argument("--picture", help="where to draw the images")
    options = parser.parse_args()
    file = np.load(options.file)  # reads an array when it is asked for
    features = backbone(options.backbone) if options.backbone else shrunk
    train, test = (embedded(file[f"X_{part}"], file[f"Y_{part}"], features) for part in ("train", "test"))
    worst, top = explained(module_for(fit(train), train, test), test, options.queries)
    true, given = file["Y_test"], file["Y_train"]
    for row, q in enumerate(worst.tolist()):
        print(f"test image {q} ({NAMES[int(true[q])]})")
        for verb, (values, indices) in (("helped", top.helpful), ("harmed", top.harmful)):
            i, score = int(indices[row, 0]), float(values[row, 0])
            print(f"  {verb} most by training image {i} ({NAMES[int(given[i])]}): {score:+.5f}")
    if options.picture:
        rows = [("test", file["X_test"][worst], true[worst], [""] * len(worst))]
        for title, (values, indices) in (("helpful", top.helpful), ("harmful", top.harmful)):
            scores = [f"{score:+.5f}" for score in values[:, 0].tolist()]
            rows.append((title, file["X_train"][indices[:, 0]], given[indices[:, 0]], scores))
        draw(options.picture, rows)


if __name__ == "__main__":
    main()
