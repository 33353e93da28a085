"""A small network, its optimizers and schedules, and a run of ``retrain`` that is the same every time."""

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import alds_fast as alds


def net(seed=0):
    """Convolution, batch norm, dropout and a linear layer on 2 x 6 x 6 images; in evaluation mode."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(12, 12, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 4),
    ).eval()  # fmt: skip


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=3e-3)


def step(optimizer):
    return lr_scheduler.MultiStepLR(optimizer, [2, 5], 0.1)


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, 7)


def warm(optimizer):
    """Made of two schedules, the second with numbers of numpy's."""
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    second = lr_scheduler.LambdaLR(optimizer, lambda epoch: np.cos(0.1 * epoch))
    return lr_scheduler.SequentialLR(optimizer, [first, second], [2])


def run(model, data, **changes):
    torch.manual_seed(5)
    options = {"keep": 0.4, "epochs": 3, "loss": nn.functional.cross_entropy, "optimizer": sgd, **changes}
    if "train" not in options and "loader" not in options:
        options["loader"] = DataLoader(data, 16, shuffle=True)
    return alds.retrain(model, **options)


def equal(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and v.dtype == w.dtype and torch.equal(v, w) for (n, v), (m, w) in pairs)


def without_seconds(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


class Stop(Exception):
    pass


def fewer_filters(model, keep, cycle):
    """Not low-rank: a random half of the filters of the first layer goes in every cycle; another structure."""
    conv, norm, follow = model[0], model[1], model[4]
    chosen = torch.randperm(conv.out_channels)[: conv.out_channels // 2].sort().values
    conv.weight, conv.bias = nn.Parameter(conv.weight[chosen].detach()), nn.Parameter(conv.bias[chosen].detach())
    follow.weight = nn.Parameter(follow.weight[:, chosen].detach())
    model[1] = nn.BatchNorm2d(len(chosen)).eval()
    model[1].weight = nn.Parameter(norm.weight[chosen].detach())
    conv.out_channels = follow.in_channels = len(chosen)
    model.pruned_to = keep, cycle
    return model
