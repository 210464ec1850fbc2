from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.nn.functional import cross_entropy

from lightning_easgd.workloads.classifier import Classifier
from lightning_easgd.workloads.data import Digits
from lightning_easgd.workloads.models import MLP

SGD = partial(torch.optim.SGD, lr=0.5)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def digits():
    return Digits(batch_size=100, image_size=8, in_channels=1, num_classes=10)


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, num_sanity_val_steps=0, **quiet, **options)


def mlp(**options):
    return Classifier(MLP((32,), image_size=8), SGD, **options)


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 0.5)])
def test_the_schedule_reaches_its_end_with_the_run(schedule, last):
    torch.manual_seed(0)
    run, model = trainer(max_epochs=2), mlp(schedule=schedule)
    run.fit(model, digits())
    assert run.global_step == 28
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(last, abs=1e-9)
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(run.callback_metrics)


class Rates(Callback):
    """Records the learning rate of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def rates(epochs, ckpt_path=None, **options):
    """The trainer after ``epochs`` epochs of 14 steps, and the learning rates of its steps."""
    torch.manual_seed(0)
    recorded = Rates()
    run = trainer(max_epochs=epochs, callbacks=[recorded], **options)
    run.fit(mlp(), digits(), ckpt_path=ckpt_path)
    return run, recorded.seen


def test_the_cosine_is_that_of_torch():
    _, seen = rates(2)
    optimizer = SGD(MLP((2,), image_size=8).parameters())
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=28)
    expected = []
    for _ in range(28):
        expected += reference.get_last_lr()
        optimizer.step()
        reference.step()
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_resumed_to_a_later_end_follows_the_longer_cosine(tmp_path, epochs):
    run, _ = rates(epochs)
    run.save_checkpoint(tmp_path / "end.ckpt")
    _, straight = rates(4)
    longer, seen = rates(4, ckpt_path=tmp_path / "end.ckpt")
    # The step after resuming still has the rate that was saved with the optimizer.
    assert seen[0] == pytest.approx(0, abs=1e-9)
    assert seen[1:] == pytest.approx(straight[14 * epochs + 1 :])
    assert longer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_run_resumed_beyond_its_end_keeps_the_rate_at_zero(tmp_path):
    run, _ = rates(4)
    run.save_checkpoint(tmp_path / "end.ckpt")
    _, seen = rates(5, ckpt_path=tmp_path / "end.ckpt", limit_train_batches=7)
    assert seen == pytest.approx([0] * 7, abs=1e-9)


def test_the_cosine_is_stepped_after_every_batch():
    torch.manual_seed(0)
    run = trainer(max_epochs=1, limit_train_batches=7)
    run.fit(mlp(), digits())
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 7


def test_test_metrics_are_exact_in_spite_of_unequal_batches():
    torch.manual_seed(0)
    model, data = mlp(), digits()
    data.setup("test")
    (values,) = trainer().test(model, data, verbose=False)
    images, labels = data._sets["test"].__getitems__(list(range(360)))
    with torch.no_grad():
        logits = model.eval()(images)
    assert values["test/loss"] == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-5)
    right = float((logits.argmax(1) == labels).float().mean())
    assert values["test/accuracy"] == pytest.approx(right, rel=1e-6)


def test_training_metrics_never_talk_to_other_ranks():
    assert not mlp().train_accuracy.sync_on_compute


def test_nothing_but_the_network_is_saved():
    model = mlp()
    assert set(model.state_dict()) == {f"net.{name}" for name in model.net.state_dict()}
    assert not model.hparams


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"schedule='step'; allowed are 'cosine' and 'constant'"):
        mlp(schedule="step")


def test_cosine_needs_an_end():
    run = trainer(max_epochs=-1)
    with pytest.raises(ValueError, match=r"run of inf steps.*max_epochs or max_steps"):
        run.fit(mlp(), digits())
