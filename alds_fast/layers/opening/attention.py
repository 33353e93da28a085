"""nn.MultiheadAttention with its projections as linear layers, which are decomposed one by one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import ArgumentError
from ..absent_weight import AbsentWeight

_ATTRIBUTES = ("embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "add_zero_attn")
_OTHER = {"forward", "merge_masks", "__call__"}


class OpenedAttention(nn.Module):
    """The same function as an ``nn.MultiheadAttention``, by the linear layers q_proj, k_proj, v_proj and out_proj.

    The weights are those of the module, of one ``in_proj_weight`` the three parts, in its memory. Arguments, outputs
    and attributes are as of ``nn.MultiheadAttention``; ``in_proj_weight`` stands for the weight that is not there, and
    torch's fused inference path, which reads that, is not taken. Only for modules of which
    :func:`why_attention_stays` says None.

    >>> opened = OpenedAttention(nn.MultiheadAttention(8, 2))
    >>> opened.q_proj, opened(*[torch.ones(3, 1, 8)] * 3)[0].shape
    (Linear(in_features=8, out_features=8, bias=True), torch.Size([3, 1, 8]))
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    in_proj_bias = None  # by this and the next torch's encoder layers see that their fused path cannot be taken
    _qkv_same_embed_dim = False

    def __init__(self, attention: Any) -> None:
        super().__init__()
        for name in _ATTRIBUTES:
            setattr(self, name, getattr(attention, name))
        bias = attention.in_proj_bias
        biases = (None,) * 3 if bias is None else tuple(map(_part_of(bias), bias.detach().chunk(3)))
        for name, weight, part in zip(("q_proj", "k_proj", "v_proj"), _weights(attention), biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], part is not None, device="meta")
            linear.weight, linear.bias = weight, part
            self.add_module(name, linear)
        self.out_proj = attention.out_proj
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v
        self.train(attention.training)

    @property
    def in_proj_weight(self) -> AbsentWeight:
        """What stands in the place of the weight of all three projections."""
        return AbsentWeight(type(self).__name__, (3 * self.embed_dim, self.embed_dim), self)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise ArgumentError("is_causal=True is a hint about attn_mask=, which is None: pass the mask too")
        batched = query.dim() == 3
        q, k, v = (self._heads(x, batched) for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        _check("key_padding_mask", key_padding_mask, [(len(k), k.shape[2])] if batched else [(k.shape[2],)])
        sizes = q.shape[2], k.shape[2]
        _check("attn_mask", attn_mask, [sizes, (len(q) * self.num_heads, *sizes)])
        k, v = (self._extended(x, bias) for x, bias in ((k, self.bias_k), (v, self.bias_v)))
        causal = is_causal and key_padding_mask is None and not need_weights
        masks = (None, None) if causal else (attn_mask, key_padding_mask)
        mask = self._mask(*masks, q, k.shape[2])
        p, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q / math.sqrt(self.head_dim) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), p)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
        y = y.transpose(1, 2).flatten(2)
        if not batched:
            y = y[0]
        elif not self.batch_first:
            y = y.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return self.out_proj(y), weights

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """A projection as (samples, heads, length, width of a head)."""
        x = x[None] if not batched else x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values with the learned one, and the zero one, at their end."""
        if bias is not None:  # (1, 1, embed_dim)
            last = bias.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            x = torch.cat([x, last.to(x.dtype).expand(len(x), -1, -1, -1)], 2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
        """Both masks as one that is added, which broadcasts to (samples, heads, queries, keys)."""
        total = None
        if attn_mask is not None:
            total = _added(attn_mask, q)
            total = total.unflatten(0, (len(q), -1)) if total.dim() == 3 else total
        if padding is not None:
            added = _added(padding if padding.dim() == 2 else padding[None], q)[:, None, None]
            total = added if total is None else total + added
        return None if total is None else F.pad(total, (0, keys - total.shape[-1]))

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def _check(name: str, mask: Tensor | None, shapes: list[tuple[int, ...]]) -> None:
    """ArgumentError for a mask that ``nn.MultiheadAttention`` would not take."""
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ArgumentError(f"{name} is of {mask.dtype}: expected a mask of torch.bool, or numbers that are added")
    if tuple(mask.shape) not in shapes:
        raise ArgumentError(f"{name} is {tuple(mask.shape)}, expected {' or '.join(map(str, shapes))}")


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask that is added to scores; True in one of booleans stands for none."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
    return mask.to(like.dtype)


def _part_of(whole: nn.Parameter) -> Any:
    """What makes a parameter of a part of another one, in its memory."""
    return lambda part: nn.Parameter(part, whole.requires_grad)


def _weights(attention: Any) -> list[nn.Parameter]:
    """Those of the projections of queries, keys and values."""
    if attention.in_proj_weight is None:
        return [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    return [*map(_part_of(attention.in_proj_weight), attention.in_proj_weight.detach().chunk(3))]


def why_attention_stays(module: nn.Module) -> str | None:
    """Why an ``nn.MultiheadAttention`` stays as it is; None if it can be opened. Hooks are not looked at."""
    attention: Any = module
    kinds = type(attention).__mro__[: type(attention).__mro__.index(nn.MultiheadAttention)]
    if changed := sorted({name for kind in kinds for name in vars(kind)} & _OTHER):
        return f"{kinds[0].__name__} is a subclass of nn.MultiheadAttention with {', '.join(changed)} of its own"
    if parametrize.is_parametrized(attention):
        name = next(iter(attention.parametrizations))
        return f"its {name} is parametrized; parametrize.remove_parametrizations(layer, {name!r}) first"
    if not isinstance(attention.out_proj, nn.Linear):
        return f"its out_proj is a {type(attention.out_proj).__name__}, not a Linear"
    if extra := set(attention._modules) - {"out_proj"} | attention._buffers.keys():
        return f"it has {', '.join(sorted(extra))} beside the parameters of nn.MultiheadAttention"
    return None
