import pytest
import torch
from torch.utils.data import Dataset

from lightning_easgd.workloads.loading import ResumableLoader


class Noisy(Dataset):
    """Augments at random, as crops do."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index + torch.rand(1)


def train(loader, batches):
    """Take batches, drawing random numbers between them, as dropout does."""
    seen = []
    for _ in range(batches):
        seen.append(next(loader).tolist())
        torch.rand(3)
    return seen


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.multiprocess)])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_the_rest_of_an_epoch_is_that_of_one_never_interrupted(workers, stop):
    def make():
        return ResumableLoader(Noisy(), batch_size=2, shuffle=True, num_workers=workers)

    torch.manual_seed(5)
    first = make()
    iterator = iter(first)
    train(iterator, stop)
    state, random = first.state_dict(), torch.get_rng_state()
    rest, after = train(iterator, 6 - stop), torch.rand(1)

    torch.manual_seed(99)
    resumed = make()
    resumed.load_state_dict(state)
    iterator = iter(resumed)
    torch.set_rng_state(random)
    assert train(iterator, 6 - stop) == rest
    assert torch.rand(1) == after
    assert next(iterator, None) is None
    assert len(list(resumed)) == 6


def test_a_state_of_a_whole_epoch_begins_the_next():
    loader = ResumableLoader(Noisy(), batch_size=2)
    list(loader)
    resumed = ResumableLoader(Noisy(), batch_size=2)
    resumed.load_state_dict(loader.state_dict())
    assert len(list(resumed)) == 6
