"""Architectures of torchvision that are not timm's too, or that are other code there."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from .case import Case, image

CLASSIFIERS = {
    64: """alexnet vgg11 vgg11_bn resnet18 wide_resnet50_2 squeezenet1_1 shufflenet_v2_x1_0 mnasnet0_5 mobilenet_v2
        mobilenet_v3_small efficientnet_b0 regnet_y_400mf densenet121 convnext_tiny""",
    96: "googlenet inception_v3",
    224: "vit_b_32 swin_t swin_v2_t maxvit_t",
}
SEGMENTATION = "lraspp_mobilenet_v3_large", "fcn_resnet50", "deeplabv3_mobilenet_v3_large"
DETECTION = "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"
VIDEO = "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t", "mvit_v2_s"
_BY_CASE: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
}  # their own initialisation takes minutes


def _build(name: str) -> nn.Module:
    import torchvision

    options = _BY_CASE.get(name, {})
    if name in (*SEGMENTATION, *DETECTION):
        options = {"weights_backbone": None}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def _pictures(size: int) -> tuple[list[torch.Tensor]]:
    return ([image(size)[0]],)


def _clip(name: str) -> torch.Tensor:
    frames, size = {"s3d": (16, 224), "mvit_v2_s": (16, 224)}.get(name, (8, 64))
    return torch.randn(1, 3, frames, size, size, device="cpu")


CASES = [
    *(
        Case(f"torchvision/{n}", partial(_build, n), partial(image, size))
        for size, names in CLASSIFIERS.items() for n in names.split()
    ),
    *(Case(f"torchvision/{name}", partial(_build, name), partial(image, 96)) for name in SEGMENTATION),
    *(Case(f"torchvision/{name}", partial(_build, name), partial(_pictures, 160)) for name in DETECTION),
    *(Case(f"torchvision/{name}", partial(_build, name), partial(_clip, name)) for name in VIDEO),
]  # fmt: skip
