"""Every architecture family of RobustBench with random weights, as small as its constructor allows.

``FAMILIES``: name -> (files in robustbench.model_zoo.architectures or None, image size, constructor).
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import timm
import torch
import torchvision
from torch import nn

from purify.compat import import_robustbench

import_robustbench()

from robustbench.model_zoo import cifar10, cifar100  # noqa: E402
from robustbench.model_zoo.architectures import (  # noqa: E402
    CARD_resnet,
    Meansparse_ra_wrn_70_16,
    Meansparse_swin_L,
    Meansparse_wrn_70_16,
    Meansparse_wrn_94_16,
    MIMIR_swin_transformer,
    bit_rn,
    bit_rn_v2,
    boosting_wide_resnet,
    comp_model,
    convnext_v2,
    convstem_models,
    dm_rn,
    dm_wide_resnet,
    mixing_net,
    output_maps,
    paf_wide_resnet,
    resnest,
    resnet,
    resnext,
    robust_resnet,
    robust_wide_resnet,
    robustarch_wide_resnet,
    sodef_layers,
    sparsified_model,
    utils_architectures,
    wide_resnet,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def bit():
    return bit_rn_v2.ResNetV2([1, 1, 1, 1], 2, head_size=10, return_features=False)


def composite():
    """Adaptive smoothing over ``bit_rn`` and ``dm_rn``: its widths are fixed, its depths are cut.

    RobustBench's code calls ``.cuda()`` in its constructor, which needs a GPU.
    """
    rob = dm_rn.WideResNet
    small = {"BiT-M-R152x2": lambda **k: bit_rn.ResNetV2([1, 1, 1, 1], 2, **k)}
    with (
        mock.patch.object(torch.Tensor, "cuda", lambda self: self),
        mock.patch.dict(comp_model.bit_rn.KNOWN_MODELS, small),
        mock.patch.object(comp_model.dm_rn, "WideResNet", lambda **k: rob(**{**k, "depth": 10})),
    ):
        return comp_model.get_composite_model("edm", "cifar10")


def mixed():
    """MixedNUTS over two small networks."""
    settings = {
        "std_map": output_maps.HardMaxMap(),
        "rob_map": output_maps.LNClampPowerScaleMap(scale=5.0, power=4.0, clamp_bias=-1.0, ln_k=250),
        "alpha": 0.9,
        "alpha_diffable": 0.5,
    }
    return mixing_net.NonLinMixedClassifier(bit(), dm_wide_resnet.DMWideResNet(depth=10, width=1), settings)


def sodef():
    """SODEF's head needs the width of WRN-70-16; its depth is cut."""
    wide = sodef_layers.DMWideResNet
    with mock.patch.object(sodef_layers, "DMWideResNet", lambda **k: wide(**{**k, "depth": 10})):
        return sodef_layers.rebuffi_sodef()


def robustarch(module):
    return module.NormalizedWideResNet(
        mean=MEAN, std=STD, stem_width=16, depth=[1, 1, 1], stage_width=[16, 32, 64], groups=[1, 1, 1],
        activation_fn=nn.SiLU, se_ratio=0.25, se_activation=nn.ReLU, se_order=2, num_classes=10, padding=0,
        num_input_channels=3,
    )  # fmt: skip


def swin(module, **options):
    return module.SwinTransformer(
        img_size=224, patch_size=4, embed_dim=16, depths=options.pop("depths", [1, 1, 1, 1]),
        num_heads=[1, 2, 2, 4], window_size=7, **options,
    )  # fmt: skip


def timm_model(name):
    return lambda: timm.create_model(name, pretrained=False)


def normalised(build):
    return lambda: utils_architectures.normalize_model(build(), MEAN, STD)


def convstem(name):
    return lambda: convstem_models.get_convstem_models(name)


FAMILIES: dict[str, tuple[str | None, int, Callable[[], nn.Module]]] = {
    "wide_resnet": ("wide_resnet", 32, lambda: wide_resnet.WideResNet(depth=10, widen_factor=1)),
    "wide_resnet sub_block1": ("wide_resnet", 32, lambda: wide_resnet.WideResNet(10, widen_factor=1, sub_block1=True)),
    "boosting": ("boosting_wide_resnet", 32, lambda: boosting_wide_resnet.BoostingWideResNet(10, 1)),
    "dm_wide_resnet": ("dm_wide_resnet", 32, lambda: dm_wide_resnet.DMWideResNet(depth=10, width=1)),
    "dm_wide_resnet swish": (
        "dm_wide_resnet", 32, lambda: dm_wide_resnet.DMWideResNet(depth=10, width=1, activation_fn=dm_wide_resnet.Swish)
    ),
    "dm_preact": ("dm_wide_resnet", 32, lambda: dm_wide_resnet.DMPreActResNet(use_cuda=False)),
    "resnet": ("resnet", 32, lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])),
    "resnet bottleneck": ("resnet", 32, lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1])),
    "preact": ("resnet", 32, lambda: resnet.PreActResNet(resnet.PreActBlock, [1, 1, 1, 1])),
    "preact v2": (
        "resnet", 32, lambda: resnet.PreActResNet(resnet.PreActBlockV2, [1, 1, 1, 1], bn_before_fc=True)
    ),
    "chen2020 ensemble": (None, 32, cifar10.Chen2020AdversarialNet),
    "resnext": (
        "resnext", 32, lambda: resnext.CifarResNeXt(resnext.ResNeXtBottleneck, 29, 2, 8, num_classes=10)
    ),
    "resnest": (
        "resnest", 32,
        lambda: resnest.ResNest(resnest.Bottleneck, [1, 1, 1, 1], radix=2, groups=1, bottleneck_width=64,
                                num_classes=10, deep_stem=True, stem_width=16, avg_down=True, avd=True),
    ),
    "robust_wide_resnet": (
        "robust_wide_resnet", 32, lambda: robust_wide_resnet.RobustWideResNet(10, [8, 8, 16, 32], [1, 1, 1])
    ),
    "robust_resnet": (
        "robust_resnet", 32, lambda: robust_resnet.PreActResNet(10, (8, 8, 16, 32), (1, 1, 1), pre_process=True)
    ),
    "card": ("CARD_resnet", 32, lambda: CARD_resnet.LRR_ResNet(width=16)),
    "card wide": ("CARD_resnet", 32, lambda: CARD_resnet.WidePreActResNet(num_blocks=[1, 1, 1, 1], widen_factor=0)),
    "card deck": (None, 32, cifar10.Diffenderfer2021CARD_Deck),
    "paf": ("paf_wide_resnet", 32, lambda: paf_wide_resnet.PAF_WideResNet(paf_wide_resnet.PSSiLU(), 10, 10, 1)),
    "sodef": ("sodef_layers", 32, sodef),
    "xcit cifar": ("xcit", 32, timm_model("debenedetti2022light_xcit_s12_cifar10_linf")),
    "robustarch": ("robustarch_wide_resnet", 32, lambda: robustarch(robustarch_wide_resnet)),
    "bit": ("bit_rn_v2", 32, bit),
    "composite": ("comp_model bit_rn dm_rn", 32, composite),
    "mixednuts": ("mixing_net", 32, mixed),
    "output maps": (
        "output_maps", 32,
        lambda: output_maps.MappedModel(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]), output_maps.IdentityMap()),
    ),
    "meansparse wrn_94_16": (
        "Meansparse_wrn_94_16", 32, lambda: Meansparse_wrn_94_16.MeanSparse_DMWideResNet(depth=10, width=1)
    ),
    "meansparse wrn_70_16": (
        "Meansparse_wrn_70_16", 32, lambda: Meansparse_wrn_70_16.DMWideResNet(depth=10, width=1)
    ),
    "meansparse ra_wrn_70_16": ("Meansparse_ra_wrn_70_16", 32, lambda: robustarch(Meansparse_ra_wrn_70_16)),
    "augmix wide_resnet, normalises inside": (None, 32, cifar100.Hendrycks2020AugMixWRNNet),
    # ImageNet, 224 x 224
    "meansparse resnet": (
        "sparsified_model", 224,
        lambda: sparsified_model.get_sparse_model(normalised(torchvision.models.resnet18)(), dataset="imagenet-Linf"),
    ),
    "meansparse swin": ("Meansparse_swin_L", 224, lambda: swin(Meansparse_swin_L, depths=(1, 1, 1, 1))),
    "mimir swin": ("MIMIR_swin_transformer", 224, lambda: swin(MIMIR_swin_transformer)),
    "convnext v2": ("convnext_v2", 224, lambda: convnext_v2.convnextv2_atto(num_classes=1000)),
    "convnext convstem": ("convstem_models", 224, convstem("convnext_t_cvst")),
    "vit convstem": ("convstem_models", 224, convstem("vit_s_cvst")),
    "alexnet": ("alexnet", 224, timm_model("alexnet_imagenet_corruptions")),
    "deit": ("deit", 224, timm_model("tian2022deeper_deit_s_imagenet_corruptions")),
    "xcit imagenet": ("xcit", 224, timm_model("debenedetti2022light_xcit_s12_imagenet_linf")),
    "torchvision resnet": ("utils_architectures", 224, normalised(torchvision.models.resnet18)),
    "timm swin": (None, 224, normalised(timm_model("swin_tiny_patch4_window7_224"))),
    "timm vit": (None, 224, normalised(timm_model("vit_tiny_patch16_224"))),
    "timm convnext": (None, 224, normalised(timm_model("convnext_atto"))),
}  # fmt: skip

# Public classifiers as they are, by the names that papers give them.
FULL: dict[str, Callable[[], nn.Module]] = {
    "WRN-28-10": lambda: wide_resnet.WideResNet(depth=28, widen_factor=10),
    "WRN-70-16": lambda: dm_wide_resnet.DMWideResNet(depth=70, width=16, activation_fn=dm_wide_resnet.Swish),
    "ResNet-50": normalised(torchvision.models.resnet50),
    "DeiT-S": normalised(timm_model("deit_small_patch16_224")),
}


def build(name: str) -> nn.Module:
    """The network of that name, its weights drawn under a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FULL[name]() if name in FULL else FAMILIES[name][2]()
