"""The loaders that all data of this package share: who sees what, and where an epoch goes on."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_easgd.workloads.loading import ResumableLoader
from lightning_easgd.workloads.sampling import (
    Sampling,
    evaluation_shard,
    require_full_batch,
    whole_set_sampler,
)
from lightning_easgd.workloads.sets import Batch, BatchSet


class SampledData(LightningDataModule, ABC):
    """Shuffled training batches for every worker, and each example once in evaluation.

    The last incomplete training batch is dropped so that all workers make equally many steps;
    evaluation sees each example once over all ranks. `setup` of a subclass fills `_sets`.
    """

    _val_split: ClassVar[str] = "val"

    def __init__(
        self,
        *,
        batch_size: int,
        sampling: Sampling = "sharded",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Checks the arguments.

        Args:
            batch_size: Examples per worker and step.
            sampling: "sharded" gives each worker its share of the training set, newly drawn in each
                epoch; "whole" lets each worker shuffle all of it by itself, as in the paper.
            num_workers: Loader processes per worker; sets in memory are fastest with 0.
            seed: Of the shuffling under sampling="whole"; Lightning's own seeds the rest.

        Raises:
            ValueError: If `batch_size` or `sampling` is not allowed.
        """
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Got data.batch_size={batch_size}; allowed is 1 or more.")
        if sampling not in {"sharded", "whole"}:
            raise ValueError(f"Got data.sampling={sampling!r}; allowed are 'sharded' and 'whole'.")
        self.batch_size = batch_size
        self.sampling = sampling
        self.num_workers = num_workers
        self.seed = seed
        self._sets: dict[str, Any] = {}
        self._collate: Callable[[Any], Batch] = _unchanged

    @abstractmethod
    def check(self) -> None:
        """Looks for the files, and reads none.

        Raises:
            FileNotFoundError: If files are missing that are not to be downloaded.
        """

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches; Lightning shards them among the workers unless sampling is "whole".

        Raises:
            ValueError: If a worker would have less than one batch.
        """
        examples: BatchSet = self._sets["train"]
        rank, world_size = self._rank_and_world_size()
        require_full_batch(
            examples, sampling=self.sampling, batch_size=self.batch_size, world_size=world_size
        )
        if self.sampling == "sharded":
            return self._loader(ResumableLoader, examples, shuffle=True, drop_last=True)
        sampler = whole_set_sampler(examples, seed=self.seed, rank=rank)
        return self._loader(ResumableLoader, examples, sampler=sampler, drop_last=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        """This rank's part of the validation set; all of it where workers train on their own.

        Raises:
            ValueError: If there are fewer examples than ranks.
        """
        return self._evaluation(self._val_split)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        """This rank's part of the test set; all of it where workers train on their own.

        Raises:
            ValueError: If there are fewer examples than ranks.
        """
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader[Batch]:
        rank, world_size = self._rank_and_world_size()
        if getattr(getattr(self.trainer, "strategy", None), "solo", False):
            rank, world_size = 0, 1  # nobody evaluates the rest
        shard, sampler = evaluation_shard(self._sets[split], rank=rank, world_size=world_size)
        return self._loader(DataLoader, shard, sampler=sampler)

    def _loader(
        self, kind: type[DataLoader[Batch]], examples: Any, **options: Any
    ) -> DataLoader[Batch]:
        return kind(
            examples,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self._collate,
            **options,
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def _unchanged(batch: Batch) -> Batch:
    return batch
