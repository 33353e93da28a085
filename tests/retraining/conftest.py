"""Images whose class is the sign of two means."""

import pytest
import torch
from torch.utils.data import TensorDataset


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, 2, 6, 6, generator=generator)
    return TensorDataset(x, (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0).long())
