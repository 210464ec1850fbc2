"""Sets of labelled images that hand out whole batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder
from typing_extensions import override

from lightning_easgd.workloads.sets import Batch, BatchSet

Augment = Literal["none", "crop_flip"]


class ImageSet(BatchSet):
    """Labelled images: float32 of shape (C, H, W) in [0, 1] and an int64 scalar.

    Attributes:
        num_classes: Number of different labels.
    """

    num_classes: int


class TensorImages(ImageSet):
    """Images held in memory."""

    def __init__(
        self, pixels: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor]
    ) -> None:
        """Wraps the tensors.

        Args:
            pixels: Shape (N, C, H, W); uint8 in [0, 255], or floating-point in [0, 1]. Only read.
            labels: Shape (N,), integers from 0.
            transform: Maps a batch of float32 images to the batch handed out.

        Raises:
            ValueError: If there are not as many labels as images.
        """
        if len(pixels) != len(labels):
            raise ValueError(
                f"Got {len(pixels)} images and {len(labels)} labels; allowed is one label for "
                "each image. The files do not belong together; get them again."
            )
        self._pixels = pixels
        self._labels = labels.long()
        self._transform = transform
        self.num_classes = int(self._labels.max()) + 1 if len(labels) else 0

    @override
    def __len__(self) -> int:
        return len(self._labels)

    @override
    def __getitems__(self, indices: list[int]) -> Batch:
        rows = torch.tensor(indices)
        pixels = self._pixels[rows]
        images = pixels / 255 if pixels.dtype == torch.uint8 else pixels.float()
        return self._transform(images), self._labels[rows]


class FolderImages(ImageSet):
    """Image files of a folder with one subfolder for each class, read when they are asked for."""

    def __init__(self, folder: Path, image_size: int, augment: Augment, *, train: bool) -> None:
        """Lists the files.

        Args:
            folder: Where the classes' subfolders are; torchvision's `ImageFolder` reads it.
            image_size: Height and width in pixels of the images handed out.
            augment: "none" scales the shorter side to `image_size` and cuts out the center.
                "crop_flip" scales it to 8/7 of that and cuts out `image_size` pixels somewhere, and
                mirrors half of the images.
            train: Whether to augment; without, "crop_flip" cuts out the center of the scaled image.
        """
        crop_flip = augment == "crop_flip"
        cut = (
            [transforms.RandomCrop(image_size), transforms.RandomHorizontalFlip()]
            if crop_flip and train
            else [transforms.CenterCrop(image_size)]
        )
        resize = transforms.Resize(image_size * 8 // 7 if crop_flip else image_size)
        self._files = ImageFolder(
            str(folder), transforms.Compose([resize, *cut, transforms.ToTensor()])
        )
        self.num_classes = len(self._files.classes)

    @override
    def __len__(self) -> int:
        return len(self._files)

    @override
    def __getitems__(self, indices: list[int]) -> Batch:
        images, labels = zip(*(self._files[index] for index in indices), strict=True)
        return torch.stack(images), torch.tensor(labels)


def center_crop(images: Tensor, size: int) -> Tensor:
    """The middle `size` by `size` pixels of images of shape (batch, C, H, W)."""
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def random_crop_flip(images: Tensor, size: int) -> Tensor:
    """Cuts `size` by `size` pixels out of each image at an offset of its own, mirrors half of them.

    It draws from torch's global generator, which Lightning seeds in every worker of a loader.

    Args:
        images: Shape (batch, C, H, W), H and W at least `size`.
        size: Height and width of the result in pixels.

    Returns:
        Shape (batch, C, size, size).
    """
    batch, _, height, width = images.shape
    windows = images.unfold(2, size, 1).unfold(3, size, 1)
    top = torch.randint(height - size + 1, (batch,))
    left = torch.randint(width - size + 1, (batch,))
    crops = windows[torch.arange(batch), :, top, left]
    mirrored = torch.rand(batch, 1, 1, 1) < 0.5
    return torch.where(mirrored, crops.flip(-1), crops)
