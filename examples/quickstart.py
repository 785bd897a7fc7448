import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import BaseObjective, InfluenceModule


class Objective(BaseObjective):
    def train_outputs(self, model, batch):
        return model(batch[0])

    def train_loss_on_outputs(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])  # the mean over the batch

    def train_regularization(self, params):
        return 0.005 * params.square().sum()  # what you trained with: here SGD with weight_decay=0.01

    def test_loss(self, model, params, batch):
        return F.cross_entropy(model(batch[0]), batch[1])


torch.manual_seed(0)
x, y = torch.randn(300, 5), torch.randint(0, 3, (300,))
model, train, test = torch.nn.Linear(5, 3), TensorDataset(x[:200], y[:200]), TensorDataset(x[200:], y[200:])
optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.01)
for _ in range(500):
    optimizer.zero_grad(), F.cross_entropy(model(x[:200]), y[:200]).backward(), optimizer.step()
module = InfluenceModule(model, Objective(), DataLoader(train, 32), DataLoader(test, 32), device="cpu", damp=1e-3)
scores = module.influences(train_idxs=range(200), test_idxs=[0])  # > 0: removing the example raises the test loss
print("most helpful:", module.helpful([0], k=3).indices[0].tolist())
print("most harmful:", module.harmful([0], k=3).indices[0].tolist())
