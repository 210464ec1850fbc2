import pytest
import torch

from lightning_easgd.workloads.images import TensorImages, center_crop, random_crop_flip


def numbered(batch, side):
    """Images whose pixels are all different, so that a crop tells where it comes from."""
    return torch.arange(batch * side * side, dtype=torch.float32).view(batch, 1, side, side)


def offset_and_mirroring(crop, side):
    first, last = int(crop[0, 0, 0]), int(crop[0, 0, -1])
    return divmod(min(first, last) % (side * side), side), last < first


def test_bytes_become_fractions_and_labels_integers():
    pixels = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).view(4, 1, 1, 1)
    images = TensorImages(pixels, torch.tensor([0, 1, 2, 1], dtype=torch.uint8), lambda x: x)
    batch, labels = images.__getitems__([2, 1])
    assert batch.flatten().tolist() == pytest.approx([1.0, 0.2])
    assert labels.tolist() == [2, 1]
    assert (batch.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (len(images), images.num_classes) == (4, 3)


def test_one_image_is_the_batch_of_one():
    images = TensorImages(numbered(3, 2), torch.arange(3), lambda x: x)
    image, label = images[1]
    assert torch.equal(image, numbered(3, 2)[1])
    assert label == 1


def test_images_and_labels_must_match():
    with pytest.raises(ValueError, match="Got 3 images and 2 labels"):
        TensorImages(numbered(3, 2), torch.arange(2), lambda x: x)


def test_center_crop_is_the_middle():
    assert center_crop(numbered(1, 4), 2).flatten().tolist() == [5, 6, 9, 10]
    assert torch.equal(center_crop(numbered(2, 4), 4), numbered(2, 4))


def test_random_crops_are_windows_at_offsets_of_their_own():
    torch.manual_seed(0)
    crops = random_crop_flip(numbered(200, 6), 4)
    assert crops.shape == (200, 1, 4, 4)
    seen = set()
    for image, crop in zip(numbered(200, 6), crops, strict=True):
        (top, left), mirrored = offset_and_mirroring(crop, 6)
        window = image[:, top : top + 4, left : left + 4]
        assert torch.equal(crop, window.flip(-1) if mirrored else window)
        seen.add((top, left, mirrored))
    assert len(seen) == 3 * 3 * 2


def test_a_crop_of_the_whole_image_only_mirrors():
    torch.manual_seed(0)
    images = numbered(100, 3)
    mirrored = (random_crop_flip(images, 3) != images).flatten(1).any(1)
    assert 30 <= int(mirrored.sum()) <= 70
