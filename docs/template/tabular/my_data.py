"""A table: 569 tumours, 30 measured numbers each, benign or not; it comes with scikit-learn."""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_breast_cancer
from torch.utils.data import DataLoader, TensorDataset


class Table(pl.LightningDataModule):
    """Its rows, of which every fifth is for validation and the next one for the test."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Reads the table; called in every worker."""
        numbers, answers = load_breast_cancer(return_X_y=True)
        x = torch.tensor(numbers, dtype=torch.float32)
        y = torch.tensor(answers)
        held_out = torch.arange(len(y)) % 5
        train = held_out > 1
        x = (x - x[train].mean(0)) / x[train].std(0)
        parts = {"train": train, "val": held_out == 0, "test": held_out == 1}
        self.parts = {name: TensorDataset(x[rows], y[rows]) for name, rows in parts.items()}

    def train_dataloader(self) -> DataLoader:
        """Shuffled; Lightning gives each worker its share."""
        return DataLoader(self.parts["train"], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.parts["val"], self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.parts["test"], self.batch_size)
