"""A Hugging Face transformer with dict batches: which sentences carry a wrong label?

What one learns: batches may be dicts, handed on to the model as they are; `labels` are taken by the loss alone.
Attention is differentiated twice without settings of yours. `gnh=True` is right for networks that are not trained to a
minimum. The model is tiny and random, made from a configuration, so that nothing is downloaded: put your own in its
place, `AutoModelForSequenceClassification.from_pretrained(...)`, and choose `params="classifier.*"` if it is large.

    python examples/transformer.py
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from torch_influence import BaseObjective, InfluenceModule

try:
    from transformers import BertConfig, BertForSequenceClassification
except ImportError:
    sys.exit("this example needs transformers: pip install transformers")

L2 = 1e-3


class Objective(BaseObjective):
    def train_outputs(self, model, batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs).logits

    def train_loss_on_outputs(self, outputs, batch):
        return F.cross_entropy(outputs, batch["labels"])

    def train_regularization(self, params):
        return 0.5 * L2 * params.square().sum()

    def test_loss(self, model, params, batch):
        return F.cross_entropy(self.train_outputs(model, batch), batch["labels"])


def sentences(count, wrong, seed=0):
    """Sentences of 4 to 8 words: two, from 3 to 9 or from 10 to 16, tell the label, the others mean nothing.

    The first few have the other label. A list of dicts, as a tokenized data set gives them: padded with word 0.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        length, label = int(torch.randint(4, 9, (), generator=generator)), i % 2
        words = torch.randint(17, 30, (8,), generator=generator)
        first = 3 if label else 10
        places = torch.randperm(length, generator=generator)[:2]
        words[places] = torch.randint(first, first + 7, (2,), generator=generator)
        mask = (torch.arange(8) < length).long()
        examples.append({"input_ids": words * mask, "attention_mask": mask, "labels": label ^ (i < wrong)})
    return examples


def small_model(hidden=16):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=hidden,
        max_position_embeddings=8,
        num_labels=2,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)


def train(model, data, epochs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    model.train()
    for _ in range(epochs):
        for batch in DataLoader(data, 32, shuffle=True):
            optimizer.zero_grad()
            loss = model(**batch).loss + 0.5 * L2 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            optimizer.step()


def module_for(model, data, test, **options):
    loaders = DataLoader(data, 32), DataLoader(test, 32)
    return InfluenceModule(model, Objective(), *loaders, "cpu", damp=1e-2, gnh=True, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="training sentences (default 300)")
    parser.add_argument("--wrong", type=int, default=10, help="so many of them mislabelled (default 10)")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    data, test = sentences(options.count, options.wrong), sentences(100, 0, seed=1)
    model = small_model()
    train(model, data, options.epochs)
    module = module_for(model, data, test)
    suspects = module.self_influences().argsort(descending=True)[: 2 * options.wrong]
    print(f"mislabelled among the {len(suspects)} largest self-influences: ", end="")
    print(f"{int((suspects < options.wrong).sum())} of {options.wrong}")
    print("checked against numbers made another way:", module.verify(print=False).summary())


if __name__ == "__main__":
    main()
