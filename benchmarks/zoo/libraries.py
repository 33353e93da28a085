"""The libraries whose architectures these are; torchvision also where its own operators cannot be loaded."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

_KEPT = []  # declarations go with their library


def import_libraries() -> None:
    """Import torchvision, timm and transformers, as far as they are there.

    A torchvision that was built for GPUs cannot be imported beside a torch for the CPU, as two operators that it names
    are not there. These are declared here then, ``nms`` with code; detectors need no more.
    """
    for name in ("torchvision", "timm", "transformers.modeling_utils"):  # of transformers what all its models import
        if not importlib.util.find_spec(name.partition(".")[0]):
            continue
        try:
            importlib.import_module(name)
        except RuntimeError as e:
            if "torchvision::" not in str(e):
                raise
            _declare()
            torchvision = importlib.import_module(name)
            torchvision.extension._has_ops = lambda: True  # detectors ask for all operators, and need nms alone


def _declare() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", kept_boxes, "CPU")
    _KEPT.append(library)


def kept_boxes(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Numbers of boxes (x0, y0, x1, y1), best first, that overlap no better one by more than ``threshold`` of both."""
    kept: list[int] = []
    corner, end = boxes[:, None, :2], boxes[:, None, 2:]
    shared = (torch.minimum(end, boxes[None, :, 2:]) - torch.maximum(corner, boxes[None, :, :2])).clamp(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    overlap = shared / (areas[:, None] + areas[None] - shared)
    for number in scores.argsort(descending=True).tolist():
        if not any(overlap[number, other] > threshold for other in kept):
            kept.append(number)
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)
