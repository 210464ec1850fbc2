import gzip
import pickle
import struct
from pathlib import Path

import pytest
import torch
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image

from lightning_easgd.workloads.data import CIFAR10, MNIST, Digits, FashionMNIST, ImageFolder

SHAPE = {"batch_size": 4, "image_size": 28, "in_channels": 1, "num_classes": 10}
COLOUR = {"batch_size": 4, "image_size": 32, "in_channels": 3, "num_classes": 10}
DEBIAN = FashionMNIST.system_places[0]


def write_idx(folder, *, suffix="", train=40, test=20):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, count in (("train", train), ("t10k", test)):
        pixels, labels = bytes(count * 28 * 28), bytes(index % 10 for index in range(count))
        for name, header, body in (
            (f"{stem}-images-idx3-ubyte", (count, 28, 28), pixels),
            (f"{stem}-labels-idx1-ubyte", (count,), labels),
        ):
            magic = struct.pack(f">BBBB{len(header)}I", 0, 0, 8, len(header), *header)
            content = magic + body
            (folder / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)


def write_folder(root, evaluation="val", classes=("cat", "dog")):
    for split in ("train", evaluation):
        for shade, label in enumerate(classes):
            (root / split / label).mkdir(parents=True)
            for index in range(2):
                image = to_pil_image(torch.full((3, 20, 30), 0.25 * shade))
                image.save(root / split / label / f"{index}.png")


@pytest.fixture
def no_system_places(monkeypatch):
    monkeypatch.setattr(FashionMNIST, "system_places", ())


def test_digits_are_split_alike_everywhere_and_by_class():
    first, second = (
        Digits(batch_size=16, image_size=8, in_channels=1, num_classes=10) for _ in range(2)
    )
    for data in (first, second):
        data.setup("fit")
    everything = list(range(1437)), list(range(360))
    for split, rows in zip(("train", "test"), everything, strict=True):
        images, labels = first._sets[split].__getitems__(rows)
        assert torch.equal(images, second._sets[split].__getitems__(rows)[0])
        assert len(first._sets[split]) == len(rows)
        assert (float(images.min()), float(images.max())) == (0.0, 1.0)
        shares = torch.bincount(labels) / len(rows)
        assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.005)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("source", [MNIST, FashionMNIST])
@pytest.mark.parametrize("nested", [False, True])
def test_idx_files_are_found_where_torchvision_puts_them_too(tmp_path, source, nested, suffix):
    write_idx(tmp_path / source.__name__ / "raw" if nested else tmp_path, suffix=suffix)
    data = source(tmp_path, **SHAPE)
    data.prepare_data()
    data.setup("fit")
    assert (len(data._sets["train"]), len(data._sets["test"])) == (40, 20)
    images, labels = data._sets["train"].__getitems__([3, 12])
    assert images.shape == (2, 1, 28, 28)
    assert labels.tolist() == [3, 2]


def test_root_comes_before_the_systems_folder(tmp_path):
    write_idx(tmp_path)
    assert FashionMNIST(tmp_path, **SHAPE)._require_place() == tmp_path


def test_files_of_two_places_are_not_mixed(tmp_path, no_system_places):
    write_idx(tmp_path)
    write_idx(tmp_path / "FashionMNIST" / "raw")
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    place = FashionMNIST(tmp_path, **SHAPE)._require_place()
    assert place == tmp_path / "FashionMNIST" / "raw"


@pytest.mark.parametrize(
    ("source", "ways"),
    [
        (FashionMNIST, ["apt-get install dataset-fashion-mnist", "data.download=true"]),
        (MNIST, ["t10k-images-idx3-ubyte", "data.download=true"]),
        (CIFAR10, ["cifar-10-batches-py", "data.download=true"]),
        (ImageFolder, ["cannot be downloaded", "data.root/train/CLASS"]),
    ],
)
def test_missing_files_name_the_places_and_the_ways_out(tmp_path, no_system_places, source, ways):
    data = source(tmp_path, **SHAPE)
    data.prepare_data()
    with pytest.raises(FileNotFoundError) as caught:
        data.setup("fit")
    for text in (*map(str, data.places()), *ways):
        assert text in str(caught.value)


@pytest.mark.parametrize("source", [MNIST, FashionMNIST])
def test_download_is_torchvisions_and_only_of_what_is_missing(
    tmp_path, monkeypatch, no_system_places, source
):
    calls = []

    def download(self):
        calls.append(self.root)
        write_idx(tmp_path / source.__name__ / "raw")

    monkeypatch.setattr(source.source, "download", download)
    monkeypatch.setattr(source.source, "_load_data", lambda self: (None, None))
    data = source(tmp_path, download=True, **SHAPE)
    data.prepare_data()
    data.prepare_data()
    data.setup("fit")
    assert calls == [str(tmp_path)]


def test_a_truncated_file_is_named(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte has .* bytes of data"):
        MNIST(tmp_path, **SHAPE).setup("fit")


def test_cifar10_is_read_from_torchvisions_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = torch.randint(256, (10, 3072), dtype=torch.uint8)
    for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        (folder / name).write_bytes(
            pickle.dumps({"data": pixels.numpy(), "labels": list(range(10))})
        )
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = CIFAR10(tmp_path, **COLOUR)
    data.setup("fit")
    images, labels = data._sets["train"].__getitems__([7, 21])
    assert len(data._sets["train"]) == 50
    assert labels.tolist() == [7, 1]
    torch.testing.assert_close(images[0], pixels[7].view(3, 32, 32) / 255)


@pytest.mark.parametrize("evaluation", ["val", "test"])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_image_folders_are_scaled_and_cut(tmp_path, evaluation, augment):
    write_folder(tmp_path, evaluation)
    data = ImageFolder(tmp_path, augment=augment, **COLOUR | {"num_classes": 2})
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        ((images, labels),) = loader
        assert images.shape == (4, 3, 32, 32)
        assert sorted(labels.tolist()) == [0, 0, 1, 1]
        shades = images[labels == 1].unique()
        assert shades.tolist() == pytest.approx([0.25], abs=0.01)


def test_image_folders_have_the_classes_configured(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError, match=r"num_classes=10, but .* has 2 classes"):
        ImageFolder(tmp_path, **COLOUR).setup("fit")


@pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="Fashion-MNIST: apt-get install dataset-fashion-mnist"
)
def test_debians_fashion_mnist_is_found_without_configuration():
    data = FashionMNIST(Path("no such folder"), **SHAPE)
    data.setup("fit")
    train, test = data._sets["train"], data._sets["test"]
    assert (len(train), len(test)) == (60_000, 10_000)
    _, labels = test.__getitems__(list(range(10_000)))
    assert labels.bincount().tolist() == [1000] * 10
    assert float(train[0][0].mean()) == pytest.approx(0.38, abs=0.01)
