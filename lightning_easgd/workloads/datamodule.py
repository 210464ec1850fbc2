"""The `LightningDataModule` that all sources of images share; `data` has the sources."""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_easgd.workloads.images import (
    Augment,
    ImageSet,
    TensorImages,
    center_crop,
    random_crop_flip,
)
from lightning_easgd.workloads.sampled import SampledData
from lightning_easgd.workloads.sampling import Sampling
from lightning_easgd.workloads.sets import Batch

Split = Literal["train", "test"]


class ImageData(SampledData):
    """Training and evaluation loaders of a set of images; subclasses know where the set is.

    The validation set is the test set: the experiments report the test error as it falls, as the
    paper does, and choose nothing by it. Choose nothing by it either, or hold out images first.

    Batches are float32 images of shape (batch, in_channels, image_size, image_size), in [0, 1]
    before they are standardized, and int64 labels of shape (batch,).
    """

    _val_split = "test"

    title: ClassVar[str]
    ways_to_get: ClassVar[str]

    def __init__(
        self,
        root: str | Path = "data",
        *,
        batch_size: int,
        image_size: int,
        in_channels: int,
        num_classes: int,
        mean: float = 0.0,
        std: float = 1.0,
        download: bool = False,
        sampling: Sampling = "sharded",
        augment: Augment = "none",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Checks the arguments; nothing is read before `setup`.

        Args:
            root: Folder of the files.
            batch_size: Images per worker and step.
            image_size: Height and width in pixels of the square handed to the model.
            in_channels: Channels of the images.
            num_classes: Number of classes.
            mean: Subtracted from every pixel value in [0, 1].
            std: Divides every pixel value after that.
            download: Whether to download what is not under `root`.
            sampling: Who sees which training image: "sharded" or "whole".
            augment: "none" cuts out the center; "crop_flip" cuts each training image at an offset
                of its own and mirrors half of them.
            num_workers: Loader processes per worker.
            seed: Of the shuffling under sampling="whole".

        Raises:
            ValueError: If `batch_size`, `std`, `sampling` or `augment` is not allowed.
        """
        super().__init__(
            batch_size=batch_size, sampling=sampling, num_workers=num_workers, seed=seed
        )
        if not std > 0:
            raise ValueError(f"Got data.std={std}; allowed is a number above 0, 1 for no scaling.")
        if augment not in {"none", "crop_flip"}:
            raise ValueError(f"Got data.augment={augment!r}; allowed are 'none' and 'crop_flip'.")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.mean = mean
        self.std = std
        self.download = download
        self.augment = augment
        self._collate = partial(_standardize, mean=mean, std=std)

    @abstractmethod
    def places(self) -> list[Path]:
        """The folders in which the set may lie, in the order of the search."""

    @abstractmethod
    def is_complete(self, place: Path) -> bool:
        """Whether the folder holds all files of the set."""

    @abstractmethod
    def fetch(self) -> None:
        """Downloads the set into one of its places."""

    @abstractmethod
    def load(self, place: Path, split: Split) -> ImageSet:
        """Reads one split from a folder that is complete."""

    @override
    def check(self) -> None:
        if not self.download:
            self._require_place()

    @override
    def prepare_data(self) -> None:
        """Downloads what is missing, if asked to; called on one process of each node."""
        # What is missing is reported by `setup`, on all ranks alike: none is left waiting.
        if self.download and self._place() is None:
            self.fetch()

    @override
    def setup(self, stage: str) -> None:
        """Reads the splits that the stage needs, once.

        Args:
            stage: Lightning's "fit" (both splits), "validate", "test" or "predict" (test split).

        Raises:
            FileNotFoundError: If files are missing; it says where to get them.
            ValueError: If a file is damaged, or the images are not what the arguments say.
        """
        splits: tuple[Split, ...] = ("train", "test") if stage == "fit" else ("test",)
        for split in splits:
            if split not in self._sets:
                self._sets[split] = self._checked(self.load(self._require_place(), split))

    def _place(self) -> Path | None:
        return next((place for place in self.places() if self.is_complete(place)), None)

    def _require_place(self) -> Path:
        place = self._place()
        if place is None:
            searched = ", ".join(str(place) for place in self.places())
            raise FileNotFoundError(
                f"{self.title} is not on disk; searched were {searched} (data.root={self.root}). "
                f"{self.ways_to_get}"
            )
        return place

    def _checked(self, images: ImageSet) -> ImageSet:
        if images.num_classes != self.num_classes:
            raise ValueError(
                f"Got data.num_classes={self.num_classes}, but {self.title} has "
                f"{images.num_classes} classes; set data.num_classes={images.num_classes}."
            )
        allowed = (self.in_channels, self.image_size, self.image_size)
        shape = tuple(images[0][0].shape)
        if shape != allowed:
            raise ValueError(
                f"{self.title} gives images of shape {shape} (channels, height, width); allowed by "
                f"data.in_channels and data.image_size is {allowed}. Correct these two."
            )
        return images

    def _in_memory(self, pixels: Tensor, labels: Tensor, split: Split) -> TensorImages:
        return TensorImages(pixels, labels, self._transform(split, tuple(pixels.shape[-2:])))

    def _transform(self, split: Split, sides: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        if not 1 <= self.image_size <= min(sides):
            raise ValueError(
                f"Got data.image_size={self.image_size}; allowed by {self.title} is 1 to "
                f"{min(sides)} pixels: the images are cut, not enlarged."
            )
        augmented = split == "train" and self.augment == "crop_flip"
        return partial(random_crop_flip if augmented else center_crop, size=self.image_size)


def _standardize(batch: Batch, *, mean: float, std: float) -> Batch:
    images, labels = batch
    return (images - mean) / std, labels
