"""One `LightningDataModule` for each source of images.

Files are looked for under `root` first; what is missing is downloaded only if `download` is set.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets
from torchvision.datasets.folder import find_classes
from typing_extensions import override

from lightning_easgd.workloads.datamodule import ImageData, Split
from lightning_easgd.workloads.idx import find_idx, read_idx
from lightning_easgd.workloads.images import FolderImages, ImageSet


class Digits(ImageData):
    """scikit-learn's handwritten digits, 8x8x1: 1437 training and 360 test images, always the same.

    They come with scikit-learn: there is nothing to download and `root` is not used. The
    validation set is the test set.
    """

    title = "digits"

    @override
    def places(self) -> list[Path]:
        return [self.root]

    @override
    def is_complete(self, place: Path) -> bool:
        return True

    @override
    def fetch(self) -> None:
        """Does nothing."""

    @override
    def load(self, place: Path, split: Split) -> ImageSet:
        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
        part = 0 if split == "train" else 1
        images = torch.tensor(parts[part], dtype=torch.float32).view(-1, 1, 8, 8) / 16
        return self._in_memory(images, torch.tensor(parts[2 + part]), split)


class MNIST(ImageData):
    """MNIST, 28x28x1: 60000 training and 10000 test images in four IDX files, gzipped or not.

    They are looked for in `root` itself and where torchvision puts them under it.
    """

    title = "MNIST"
    ways_to_get = (
        "Put train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz], t10k-images-idx3-ubyte"
        "[.gz] and t10k-labels-idx1-ubyte[.gz] into the first of them, or set data.download=true."
    )
    source: ClassVar[Any] = datasets.MNIST
    system_places: ClassVar[tuple[Path, ...]] = ()

    @override
    def places(self) -> list[Path]:
        return [self.root, self.root / self.source.__name__ / "raw", *self.system_places]

    @override
    def is_complete(self, place: Path) -> bool:
        names = [name for split in ("train", "test") for name in _idx_names(split)]
        return all(find_idx(place, name) for name in names)

    @override
    def fetch(self) -> None:
        self.source(str(self.root), download=True)

    @override
    def load(self, place: Path, split: Split) -> ImageSet:
        files = [find_idx(place, name) for name in _idx_names(split)]
        pixels, labels = (read_idx(file) for file in files if file is not None)
        return self._in_memory(pixels.unsqueeze(1), labels, split)


class FashionMNIST(MNIST):
    """Fashion-MNIST, made like MNIST; Debian's dataset-fashion-mnist is found without a `root`."""

    title = "Fashion-MNIST"
    ways_to_get = (
        "Either `apt-get install dataset-fashion-mnist` (Debian and Ubuntu), or set "
        "data.download=true."
    )
    source = datasets.FashionMNIST
    system_places = (Path("/usr/share/datasets/fashion-mnist"),)


class CIFAR10(ImageData):
    """CIFAR-10, 32x32x3: 50000 training and 10000 test images, torchvision's files."""

    title = "CIFAR-10"
    ways_to_get = (
        "Unpack cifar-10-python.tar.gz under data.root, so that it has the folder "
        "cifar-10-batches-py, or set data.download=true."
    )

    @override
    def places(self) -> list[Path]:
        return [self.root / datasets.CIFAR10.base_folder]

    @override
    def is_complete(self, place: Path) -> bool:
        files = datasets.CIFAR10.train_list + datasets.CIFAR10.test_list
        return all((place / name).is_file() for name, _ in files)

    @override
    def fetch(self) -> None:
        datasets.CIFAR10(str(self.root), download=True)

    @override
    def load(self, place: Path, split: Split) -> ImageSet:
        files = datasets.CIFAR10(str(place.parent), train=split == "train")
        pixels = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
        return self._in_memory(pixels, torch.tensor(files.targets), split)


class ImageFolder(ImageData):
    """Colour images in one folder per class: `root`/train, and `root`/val or `root`/test.

    Images of any size are scaled and cut to `image_size`; they are read when a batch needs them,
    so give it some `num_workers`. The evaluation folder is `root`/val if there is one.
    """

    title = "The image folder"
    ways_to_get = (
        "It cannot be downloaded. Lay it out as data.root/train/CLASS/*.jpg and "
        "data.root/val/CLASS/*.jpg (or data.root/test/CLASS/*.jpg), one folder for each class."
    )

    @override
    def places(self) -> list[Path]:
        return [self.root]

    @override
    def is_complete(self, place: Path) -> bool:
        return (place / "train").is_dir() and _evaluation_folder(place).is_dir()

    @override
    def fetch(self) -> None:
        """Does nothing: `setup` says what layout it wants."""

    @override
    def load(self, place: Path, split: Split) -> ImageSet:
        train = split == "train"
        folder = place / "train" if train else _evaluation_folder(place)
        return FolderImages(folder, self.image_size, self.augment, train=train)


def count_classes(root: str | Path) -> int:
    """Number of classes of an :class:`ImageFolder`: of folders in `root`/train.

    Raises:
        FileNotFoundError: If there are none.
    """
    train = Path(root).expanduser() / "train"
    if not train.is_dir():
        raise FileNotFoundError(
            f"{ImageFolder.title} is not on disk; searched was {train} (data.root={root}). "
            f"{ImageFolder.ways_to_get}"
        )
    return len(find_classes(str(train))[0])


def _idx_names(split: str) -> tuple[str, str]:
    stem = "train" if split == "train" else "t10k"
    return f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"


def _evaluation_folder(root: Path) -> Path:
    return root / "val" if (root / "val").is_dir() else root / "test"
