"""Image classifiers: logits of shape (batch, num_classes) from images of shape (batch, C, H, W)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

Stem = Literal["small", "imagenet"]
Block = type[BasicBlock] | type[Bottleneck]

_RESNET_LAYERS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


def _require_size(model: str, image_size: int, smallest: int) -> None:
    if image_size < smallest:
        raise ValueError(
            f"{model} got image_size={image_size}; allowed is {smallest} or more. "
            "Use larger images or another model (cnn, mlp and resnet take small ones)."
        )


class CNN(nn.Sequential):
    """Two 3x3 convolutions of 32 and 64 channels, each halved by pooling, and 256 hidden units.

    It has 0.82 million parameters at 28x28x1 and 0.09 million at 8x8x1, and no BatchNorm, so that
    the average of several copies needs no statistics of its own.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        dropout: float = 0.5,
    ) -> None:
        """Builds the layers.

        Args:
            in_channels: Channels of the images.
            num_classes: Number of logits.
            image_size: Height and width of the images in pixels, at least 4.
            dropout: Probability of dropping a hidden unit; a pooled feature half as often.

        Raises:
            ValueError: If the images are too small to be halved twice.
        """
        _require_size("CNN", image_size, 4)
        super().__init__(
            nn.Conv2d(in_channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout / 2),
            nn.Linear(64 * (image_size // 4) ** 2, 256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )


class ConvNet7(nn.Sequential):
    """The CIFAR-10 network of the EASGD paper (Zhang, Choromanska and LeCun 2015, section 5.1).

    Unpadded convolutions 5x5-64, 5x5-128 and 3x3-64, the first two followed by 2x2 pooling, then
    256 hidden units with dropout. The paper feeds it 28x28 crops.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: int = 28,
        dropout: float = 0.5,
    ) -> None:
        """Builds the layers.

        Args:
            in_channels: Channels of the images.
            num_classes: Number of logits.
            image_size: Height and width of the images in pixels, at least 24.
            dropout: Probability of dropping a hidden unit.

        Raises:
            ValueError: If nothing would be left of the images after the last convolution.
        """
        _require_size("ConvNet7", image_size, 24)
        side = ((image_size - 4) // 2 - 4) // 2 - 2
        super().__init__(
            nn.Conv2d(in_channels, 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * side**2, 256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )


class MLP(nn.Sequential):
    """Fully connected layers with ReLU and dropout between them."""

    def __init__(
        self,
        hidden: Sequence[int] = (256, 256),
        *,
        dropout: float = 0.0,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
    ) -> None:
        """Builds the layers.

        Args:
            hidden: Widths of the hidden layers; empty makes a linear classifier.
            dropout: Probability of dropping a hidden unit.
            in_channels: Channels of the images.
            num_classes: Number of logits.
            image_size: Height and width of the images in pixels.

        Raises:
            ValueError: If the images have no pixels.
        """
        _require_size("MLP", image_size, 1)
        widths = [in_channels * image_size**2, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class ResNet(nn.Module):
    """Residual network (He et al. 2015) of torchvision's blocks, at any width and for small images.

    torchvision's own class fixes the width at 64. With `width=64` and `stem="imagenet"` the two
    have the same parameters under the same names, so torchvision's weights load into this one.
    """

    def __init__(
        self,
        depth: int = 18,
        *,
        width: int = 64,
        stem: Stem = "small",
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        """Builds the layers and draws their weights.

        Args:
            depth: 18, 34 or 50 layers.
            width: Channels of the first stage, doubled in each of the three stages that follow.
            stem: "small" (3x3 convolution, full resolution) or "imagenet" (7x7 convolution of
                stride 2, then pooling of stride 2).
            in_channels: Channels of the images.
            num_classes: Number of logits.

        Raises:
            ValueError: If the depth, the width or the stem is not one of those above.
        """
        _check_resnet(depth, width, stem)
        super().__init__()
        imagenet = stem == "imagenet"
        self.conv1 = nn.Conv2d(
            in_channels,
            width,
            kernel_size=7 if imagenet else 3,
            stride=2 if imagenet else 1,
            padding=3 if imagenet else 1,
            bias=False,
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()
        block, (first, second, third, fourth) = _RESNET_LAYERS[depth]
        features = width * block.expansion
        self.layer1 = _stage(block, width, width, blocks=first, stride=1)
        self.layer2 = _stage(block, features, 2 * width, blocks=second, stride=2)
        self.layer3 = _stage(block, 2 * features, 4 * width, blocks=third, stride=2)
        self.layer4 = _stage(block, 4 * features, 8 * width, blocks=fourth, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, num_classes) of images of shape (batch, in_channels, H, W)."""
        out = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(out), 1))
        return logits


def _check_resnet(depth: int, width: int, stem: str) -> None:
    if depth not in _RESNET_LAYERS:
        raise ValueError(f"resnet got depth={depth}; allowed are {sorted(_RESNET_LAYERS)}.")
    if width < 1:
        raise ValueError(f"resnet got width={width}; allowed is 1 or more (64 is the usual one).")
    if stem not in {"small", "imagenet"}:
        raise ValueError(
            f"resnet got stem={stem!r}; allowed are 'small' (images below some 64 pixels) and "
            "'imagenet' (larger ones)."
        )


def _stage(block: Block, inputs: int, planes: int, *, blocks: int, stride: int) -> nn.Sequential:
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        )
    first = block(inputs, planes, stride, shortcut)
    return nn.Sequential(first, *(block(outputs, planes) for _ in range(1, blocks)))
