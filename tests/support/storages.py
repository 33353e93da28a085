"""The bytes of the tensors that a run makes, followed one by one: what operators take for themselves is not seen."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Followed(TorchDispatchMode):
    """Inside, ``live`` is what the new tensors that are alive take, and ``peak`` the most of it."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.live = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in self.alive:
                    self.alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))
                    self.live += size
                    self.peak = max(self.peak, self.live)
        return out

    def _gone(self, key, size):
        del self.alive[key]
        self.live -= size


def followed_peak(model, x):
    """The peak of one run, of the model as it is."""
    known = [*model.parameters(), *model.buffers(), x]
    with torch.no_grad(), Followed(known) as followed:
        model(x)
    return followed.peak
