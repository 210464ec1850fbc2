"""Models and data for the scripts and the tests; the library itself never imports this package.

- `models`: the networks, plain `torch.nn.Module`s;
- `classifier`: the `LightningModule` that trains any of them;
- `images`, `idx`, `sampling`: image sets in memory, their files, and who sees which image;
- `loading`: a loader that goes on in the middle of an epoch;
- `datamodule`, `data`: what all `LightningDataModule`s share, and one for each source of images;
- `devices`: the device of a single-process run.
"""
