import pytest
import torch
from torchvision.models import resnet18, resnet50

from lightning_easgd.workloads.models import CNN, MLP, ConvNet7, ResNet


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_cnn_has_four_fifths_of_a_million_parameters_at_28x28():
    assert 750_000 <= count(CNN()) <= 850_000


@pytest.mark.parametrize(("in_channels", "image_size"), [(1, 4), (1, 8), (3, 32), (3, 33)])
def test_cnn_takes_any_image_size(in_channels, image_size):
    model = CNN(in_channels, num_classes=7, image_size=image_size)
    assert model(torch.rand(2, in_channels, image_size, image_size)).shape == (2, 7)


def test_convnet7_has_the_shapes_of_the_paper():
    out, shapes = torch.rand(1, 3, 28, 28), []
    for layer in ConvNet7():
        out = layer(out)
        if isinstance(layer, torch.nn.Conv2d | torch.nn.MaxPool2d | torch.nn.Linear):
            shapes.append(tuple(out.shape[1:]))
    convolutions = [(64, 24, 24), (64, 12, 12), (128, 8, 8), (128, 4, 4), (64, 2, 2)]
    assert shapes == [*convolutions, (256,), (10,)]


@pytest.mark.parametrize("image_size", [24, 25, 32])
def test_convnet7_adapts_to_the_image_size(image_size):
    assert ConvNet7(1, 5, image_size)(torch.rand(2, 1, image_size, image_size)).shape == (2, 5)


@pytest.mark.parametrize("hidden", [(), (8,), (16, 8)])
def test_mlp_has_the_hidden_layers_asked_for(hidden):
    model = MLP(hidden, image_size=4, num_classes=3)
    linear = [layer.out_features for layer in model if isinstance(layer, torch.nn.Linear)]
    assert linear == [*hidden, 3]
    assert model(torch.rand(2, 1, 4, 4)).shape == (2, 3)


@pytest.mark.parametrize(("depth", "reference"), [(18, resnet18), (50, resnet50)])
def test_resnet_of_the_usual_width_is_torchvisions(depth, reference):
    theirs = reference(num_classes=10).eval()
    ours = ResNet(depth, stem="imagenet").eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_resnet_scales_with_its_width_and_keeps_small_images_large(depth):
    model = ResNet(depth, width=4, in_channels=1)
    assert model.maxpool(model.conv1(torch.rand(2, 1, 8, 8))).shape == (2, 4, 8, 8)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert model.fc.in_features == (32 if depth < 50 else 128)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNN(image_size=3), r"CNN got image_size=3; allowed is 4"),
        (lambda: ConvNet7(image_size=23), r"ConvNet7 got image_size=23; allowed is 24"),
        (lambda: MLP(image_size=0), r"MLP got image_size=0; allowed is 1"),
        (lambda: ResNet(20), r"depth=20; allowed are \[18, 34, 50\]"),
        (lambda: ResNet(width=0), r"width=0; allowed is 1"),
        (lambda: ResNet(stem="large"), r"stem='large'; allowed are 'small'.*'imagenet'"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
