"""A text as bytes, and the language model that is trained on it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_easgd.workloads.gpt import GPT
from lightning_easgd.workloads.language import LanguageModel
from lightning_easgd.workloads.text import TextData, Windows, files, read


def text_of(loader):
    return b"".join(bytes(inputs.flatten().tolist()) for inputs, _ in loader)


def test_windows_predict_each_byte_from_those_before_it_once():
    windows = Windows(torch.arange(22, dtype=torch.uint8), 5)
    inputs, targets = windows.__getitems__(list(range(len(windows))))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.flatten().tolist() == list(range(20))
    assert targets.flatten().tolist() == list(range(1, 21))


def test_the_parts_of_a_text_do_not_overlap_and_keep_its_order(tmp_path):
    (tmp_path / "b.txt").write_bytes(bytes(range(100, 200)))
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    (tmp_path / ".hidden").write_bytes(b"not this")
    data = TextData(tmp_path, context=3, batch_size=1)
    data.setup("fit")
    assert text_of(data.val_dataloader()) == bytes(range(180, 189))
    assert text_of(data.test_dataloader()) == bytes(range(190, 199))
    seen = sorted(bytes(inputs.flatten().tolist()) for inputs, _ in data.train_dataloader())
    assert b"".join(seen) == bytes(range(177))


def test_a_text_is_cut_off_where_it_is_said(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"0123456789")
    assert bytes(read(files(tmp_path / "a.txt"), 4).tolist()) == b"0123"
    assert bytes(read(files(tmp_path / "a.txt"), None).tolist()) == b"0123456789"
    assert bytes(read([tmp_path / "a.txt"] * 3, 14).tolist()) == b"01234567890123"


def test_without_a_path_it_is_the_standard_librarys_source():
    first, *_ = text = files(None)
    assert first.name == "__future__.py"
    assert text == sorted(text)
    assert len(read(text, 2_000_000)) == 2_000_000


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"path": "nowhere"}, FileNotFoundError, r"data\.path=nowhere is no file, and no folder"),
        ({"max_bytes": 1000}, ValueError, r"get 50 each; allowed is more than data\.context=64"),
        ({"max_bytes": 0}, ValueError, r"data\.max_bytes=0; allowed is 1 or more"),
        ({"context": 0}, ValueError, r"data\.context=0; allowed is 1 or more"),
        ({"batch_size": 0}, ValueError, r"data\.batch_size=0; allowed is 1 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_into_windows_is_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        TextData(**{"batch_size": 1, **arguments}).setup("fit")
    if kind is FileNotFoundError:
        with pytest.raises(kind, match=message):
            TextData(**{"batch_size": 1, **arguments}).check()


def test_a_prediction_does_not_see_what_it_predicts():
    net = GPT(context=8, width=16, heads=2)
    tokens = torch.randint(256, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 256
    before, after = net(tokens)[0], net(changed)[0]
    torch.testing.assert_close(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


def test_an_input_beyond_the_context_and_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got 9 tokens; allowed are 8\. Set model\.context=9"):
        GPT(context=8, width=16)(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="a width that is a multiple of heads"):
        GPT(width=10, heads=4)


class Alternating(nn.Module):
    """Is sure that 0 follows 1, and guesses between 0 and 1 after 0."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.full((2, 2), 0.5).log())
        with torch.no_grad():
            self.table[1] = torch.tensor([1.0, 1e-30]).log()

    def forward(self, tokens):
        return self.table[tokens]


def test_bits_per_byte_are_those_of_the_whole_text(tmp_path):
    (tmp_path / "text").write_bytes(bytes([0, 1] * 500))
    data = TextData(tmp_path / "text", context=7, batch_size=4)  # 7 windows: batches of 4 and 3
    net = Alternating()
    module = LanguageModel(net, partial(torch.optim.SGD, lr=0.0), schedule="constant")
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    trainer = Trainer(accelerator="cpu", barebones=False, default_root_dir=tmp_path, **quiet)
    (tested,) = trainer.test(module, data, verbose=False)
    predicted = torch.tensor([0, 1] * 500, dtype=torch.uint8)[-50:][:49]
    bits = float((predicted == 0).float().mean())
    assert tested["test/bits_per_byte"] == pytest.approx(bits)
    assert tested["test/loss"] == pytest.approx(bits * math.log(2))
