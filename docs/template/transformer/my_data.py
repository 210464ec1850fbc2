"""Sequences of letters that are made up: which letter comes most often in each?"""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Letters(pl.LightningDataModule):
    """Random sequences; the same in every worker."""

    def __init__(self, letters: int = 4, length: int = 15, batch_size: int = 32) -> None:
        super().__init__()
        self.letters, self.length, self.batch_size = letters, length, batch_size

    def rows(self, count: int, seed: int) -> TensorDataset:
        """Sequences, and of each the letter that comes most often."""
        random = torch.Generator().manual_seed(seed)
        x = torch.randint(self.letters, (count, self.length), generator=random)
        return TensorDataset(x, torch.mode(x).values)

    def train_dataloader(self) -> DataLoader:
        """Shuffled; Lightning gives each worker its share."""
        return DataLoader(self.rows(4096, 0), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.rows(512, 1), self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.rows(512, 2), self.batch_size)
