import torch

import alds_fast as alds


def test_compress_halves():
    model = torch.nn.Linear(64, 64)
    assert sum(p.numel() for p in alds.compress(model, params=0.5).parameters()) <= 0.5 * 64 * 65
