import pytest
import torch

from lightning_easgd.workloads.devices import single_device


@pytest.fixture
def machine(monkeypatch):
    def build(*, cuda, mps):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.mps, "is_available", lambda: mps)

    return build


@pytest.mark.parametrize(
    ("accelerator", "cuda", "mps", "device"),
    [
        ("cpu", True, False, "cpu"),
        ("auto", False, False, "cpu"),
        ("auto", True, False, "cuda:0"),
        ("auto", False, True, "mps"),
        ("gpu", True, False, "cuda:0"),
        ("gpu", False, True, "mps"),
        ("gpu", False, False, "cuda:0"),
        ("cuda", True, False, "cuda:0"),
        ("mps", False, True, "mps"),
    ],
)
def test_device_follows_the_accelerator(machine, accelerator, cuda, mps, device):
    machine(cuda=cuda, mps=mps)
    assert single_device(accelerator) == torch.device(device)


def test_unknown_accelerator_is_refused():
    with pytest.raises(ValueError, match=r"'tpu'; allowed are cpu, gpu, cuda, mps and auto"):
        single_device("tpu")
