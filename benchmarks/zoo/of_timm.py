"""Architectures of timm, by the size of the picture that they are run with."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .case import Case, image

NAMES = {
    64: """resnet18 resnet26d resnext50_32x4d seresnet18 skresnet18 ecaresnet26t gcresnet33ts resnest14d
        lambda_resnet26t resnetv2_50 resnetv2_50x1_bit nf_resnet26 nf_regnet_b0 dm_nfnet_f0 nfnet_f0
        densenet121 dla34 dpn48b dpn68 res2net50_14w_8s res2next50 hrnet_w18_small cspresnet50
        cspdarknet53 darknet53 vovnet39a selecsls42 tresnet_m regnetx_002 regnety_002 efficientnet_b0
        tf_efficientnet_b0 tf_efficientnetv2_b0 mobilenetv2_100 mobilenetv3_small_100
        mobilenetv4_conv_small mnasnet_small fbnetc_100 lcnet_035 tinynet_e rexnet_100 ghostnet_100
        ghostnetv2_100 ghostnetv3_100 hardcorenas_a mobileone_s0 repvgg_a0 repghostnet_050 hgnetv2_b0
        convnext_atto convnext_tiny convnextv2_atto inception_next_atto focalnet_tiny_srf starnet_s1
        fasternet_t0 mambaout_femto convmixer_768_32 poolformer_s12 poolformerv2_s12 caformer_s18
        edgenext_xx_small rdnet_tiny efficientvit_b0 pvt_v2_b0 davit_tiny mobilevit_xxs mobilevitv2_050""",
    96: "inception_v3 inception_v4 inception_resnet_v2 legacy_xception",
    192: "swiftformer_xs",
    224: """mixer_s32_224 resmlp_12_224 gmlp_ti16_224 vit_tiny_patch16_224 deit_tiny_patch16_224
        deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224
        vit_relpos_small_patch16_224 swin_tiny_patch4_window7_224 mvitv2_tiny coat_tiny levit_128s
        efficientformer_l1 efficientformerv2_s0 maxvit_tiny_tf_224 cait_xxs24_224 xcit_nano_12_p16_224
        crossvit_tiny_240 convit_tiny twins_pcpvt_small twins_svt_small visformer_tiny volo_d1_224
        tnt_s_legacy_patch16_224 pit_ti_224 nest_tiny hiera_tiny_224 tiny_vit_5m_224 gcvit_xxtiny
        sequencer2d_s vitamin_small_224 efficientvit_m0 coatnet_nano_rw_224 repvit_m0_9 fastvit_t8""",
    256: "swinv2_tiny_window8_256 botnet26t_256 halonet26t sebotnet33ts_256",
}


def _build(name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


CASES = [
    Case(f"timm/{name}", partial(_build, name), partial(image, 240 if name.endswith("_240") else size))
    for size, names in NAMES.items()
    for name in names.split()
]
