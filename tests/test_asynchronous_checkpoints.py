"""Checkpoints of workers at their own pace: each saves and restores what it alone knows."""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from processes import run_workers
from served import free_ports
from toy import Resumable, Toy, bits, trainer, weights
from waiting import until

from lightning_easgd import EASGDStrategy
from lightning_easgd.checkpoint.files import workers_folder
from lightning_easgd.server import Settings
from lightning_easgd.strategy.beside import Beside

pytest.importorskip("grpc", reason="needs gRPC: pip install -e '.[async]'")
pytest.importorskip("safetensors", reason="needs safetensors: pip install -e '.[async]'")
from lightning_easgd.server.serving import Serving

pytestmark = [
    pytest.mark.timeout(170),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

ADAM = partial(torch.optim.Adam, lr=0.05)
WORKERS = 3


class Noting(Toy):
    """Notes what it is when it saves, and what it is when it goes on.

    Args:
        at: calls ``before`` at the end of the batch with this index, ahead of saving.
    """

    def __init__(self, at: int = -1, before: Callable[[], object] = lambda: None) -> None:
        super().__init__(ADAM)
        self.at, self.before = at, before
        self.saved: Any = None
        self.begun: Any = None

    def now(self) -> dict[str, Any]:
        (states,) = (each.state_dict()["state"] for each in self.trainer.optimizers)
        return {
            "step": self.trainer.global_step,
            "weights": bits(weights(self)),
            "optimizer": [{k: v.numpy().tobytes() for k, v in s.items()} for s in states.values()],
            "random": torch.get_rng_state().tolist(),
            "exchanges": self.trainer.strategy.telemetry.exchanges,
        }

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.begun = self.begun or self.now()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.rand(1).item() * super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            self.before()
            self.saved = self.now()


def start(
    workers: int, callbacks: list[Any], strategy: Any = None, epochs: int = 1, **options: Any
) -> Any:
    strategy = strategy or EASGDStrategy(**{"center": "local", "tau": 2} | options)
    saves = {"callbacks": callbacks, "enable_checkpointing": bool(callbacks)}
    return trainer(workers, strategy, max_epochs=epochs, **saves)


def told(module: Noting) -> bool:
    """Whether a worker has heard of a checkpoint that it has not answered."""
    return bool(module.trainer.strategy._fit.beside.due())


def save_in_the_middle(rank: int, folder: Path) -> Any:
    """Worker 0 saves at its step 4, the others at their own when they hear of it."""
    torch.manual_seed(rank)
    module = Noting([3, 5, 2][rank])
    module.before = lambda: rank == 0 or until(lambda: told(module), 60)
    saved = ModelCheckpoint(folder, "mid", every_n_train_steps=4, save_top_k=1)
    start(WORKERS, [saved] if rank == 0 else []).fit(module, Resumable(rank, 7))
    return module.saved


def go_on(rank: int, path: str, workers: int, **options: Any) -> Any:
    """What a worker begins with, and what it said."""
    module = Noting()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            start(workers, [], **options).fit(module, Resumable(rank, 7), ckpt_path=path)
        except Exception as error:
            return type(error).__name__, str(error)
    said = [str(each.message) for each in caught if "fresh optimizers" in str(each.message)]
    return module.begun, said


@pytest.fixture(scope="module")
def saved(forked_server: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A checkpoint of three workers, not to be written to; and what they were."""
    folder = tmp_path_factory.mktemp("saved")
    return folder / "mid.ckpt", run_workers(save_in_the_middle, folder, workers=3, timeout=150)


def files(path: Path) -> list[str]:
    return sorted(each.name for each in Path(workers_folder(path)).iterdir())


@pytest.mark.usefixtures("forked_server")
def test_each_worker_goes_on_from_its_own_state_bit_for_bit(saved: Any) -> None:
    path, were = saved
    assert [each["step"] for each in were] == [4, 6, 3]
    save = torch.load(path, weights_only=True)["lightning_easgd"]["save"]
    assert sorted(each.name for each in path.parent.iterdir()) == ["mid.ckpt", "mid.ckpt.workers"]
    assert files(path) == [f"{save}-{rank}.ckpt" for rank in range(WORKERS)]
    for was, (begun, said) in zip(were, run_workers(go_on, str(path), 3, workers=3), strict=True):
        assert said == []
        assert begun == was


@pytest.mark.usefixtures("forked_server")
def test_fewer_and_more_workers_go_on(saved: Any) -> None:
    path, were = saved
    (begun, _), (other, _) = run_workers(go_on, str(path), 2, workers=2)
    assert [begun, other] == were[:2]
    *kept, (late, said) = run_workers(go_on, str(path), 4, workers=4)
    assert [begun for begun, _ in kept] == were
    assert said == []
    assert late["optimizer"] == []
    assert late["weights"] != were[0]["weights"]


@pytest.mark.usefixtures("forked_server")
@pytest.mark.parametrize("how", ["missing", "of another save", "altered"])
def test_a_worker_whose_file_is_none_starts_at_the_center_and_says_so(
    how: str, saved: Any, tmp_path: Path
) -> None:
    original, were = saved
    path = tmp_path / "mid.ckpt"
    shutil.copy(original, path)
    shutil.copytree(workers_folder(original), workers_folder(path))
    (mine,) = Path(workers_folder(path)).glob("*-1.ckpt")
    content = torch.load(mine, weights_only=True)
    reason = f"{mine} was altered since it was written"
    if how == "missing":
        reason = str(mine)
        mine.unlink()
    elif how == "altered":
        content["weights"]["tensors"]["w"] += 1
        torch.save(content, mine)
    else:
        torch.save({**content, "save": "0123456789ab"}, mine)
        reason = f"{mine} is that of worker 1 in save 0123456789ab, not of 1 in {mine.name[:12]}"
    found = run_workers(go_on, str(path), 3, workers=3)
    assert [said for _, said in found[::2]] == [[], []]
    begun, (said,) = found[1]
    assert said.startswith("Worker 1 starts at the center, with fresh optimizers: ")
    assert reason in said
    assert begun["optimizer"] == []
    assert [found[0][0], found[2][0]] == [were[0], were[2]]


def strictly(rank: int, path: str) -> Any:
    return go_on(rank, path, 1, strict_resume=True)


@pytest.mark.usefixtures("forked_server")
def test_a_missing_file_may_be_an_error(saved: Any, tmp_path: Path) -> None:
    path = tmp_path / "mid.ckpt"
    shutil.copy(saved[0], path)
    ((error, said),) = run_workers(strictly, str(path), workers=1)
    assert error == "CheckpointError"
    assert said.startswith(f"Not all workers have their own state in {path}: worker 0: ")


def go_on_apart(rank: int, path: str, refused: Path) -> Any:
    """Worker 1 finds no checkpoint; worker 0, which would wait for it at the end, ends then."""
    module = Toy(ADAM)

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        until(refused.exists, 60)
        raise EOFError

    module.on_train_batch_end = on_train_batch_end
    try:
        start(2, []).fit(module, Resumable(rank, 7), ckpt_path=None if rank else path)
    except Exception as error:
        refused.touch()
        return type(error).__name__, str(error)


@pytest.mark.usefixtures("forked_server")
def test_a_worker_that_finds_another_checkpoint_than_worker_0_does_not_bring_its_weights(
    saved: Any, tmp_path: Path
) -> None:
    save = torch.load(saved[0], weights_only=True)["lightning_easgd"]["save"]
    given = str(saved[0]), tmp_path / "refused"
    (ended, _), (error, said) = run_workers(go_on_apart, *given, workers=2, timeout=150)
    assert (ended, error) == ("EOFError", "CheckpointError")
    assert f"goes on from no checkpoint, and worker 0 from save {save}, step 4." in said


def keep_one(rank: int, folder: Path, ends: bool) -> list[int]:
    """Worker 0 saves after every step; the others go on until they have answered each."""
    module = Noting()
    steps: list[int] = []

    def on_train_batch_end(outputs: Any, batch: Any, batch_idx: int) -> None:
        steps.append(batch_idx)
        if rank == 0:
            time.sleep(0.3)

    module.on_train_batch_end = on_train_batch_end
    options: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": 1, "save_last": True}
    saves = [ModelCheckpoint(folder, "{step}", **options)]
    start(2, saves).fit(module, Resumable(rank, 2 if rank and ends else 8))
    return steps


@pytest.mark.usefixtures("forked_server")
@pytest.mark.parametrize("ends", [False, True])
def test_a_checkpoint_goes_with_the_files_of_all_and_one_that_has_ended_still_saves(
    ends: bool, tmp_path: Path
) -> None:
    run_workers(keep_one, tmp_path, ends, workers=2, timeout=150)
    kept = ["last.ckpt", "last.ckpt.workers", "step=8.ckpt", "step=8.ckpt.workers"]
    assert sorted(each.name for each in tmp_path.iterdir()) == kept
    for name in ("step=8.ckpt", "last.ckpt"):
        content = torch.load(tmp_path / name, weights_only=True)
        save = content["lightning_easgd"]["save"]
        assert files(tmp_path / name) == [f"{save}-{rank}.ckpt" for rank in range(2)]
        own = torch.load(tmp_path / f"{name}.workers/{save}-1.ckpt", weights_only=True)
        assert own["checkpoint"]["global_step"] == own["pace"]["clock"] == (2 if ends else 8)


def stop_all(rank: int, folder: Path) -> Any:
    """A signal to each worker, at a step of its own."""
    module = Noting(3 + rank)

    def end_all() -> None:
        (folder / f"{rank}").touch()
        until(lambda: (folder / "0").exists() and (folder / "1").exists(), 60)
        os.kill(os.getpid(), signal.SIGTERM)

    module.before = end_all
    saves = ModelCheckpoint(folder, "last", save_on_exception=True, every_n_epochs=9)
    with pytest.raises(SIGTERMException):
        start(2, [saves]).fit(module, Resumable(rank, 30))
    return module.saved


@pytest.mark.usefixtures("forked_server")
def test_workers_that_are_told_to_end_save_their_own_states_first(tmp_path: Path) -> None:
    stopped = run_workers(stop_all, tmp_path, workers=2, timeout=150)
    found = run_workers(go_on, str(tmp_path / "last.ckpt"), 2, workers=2)
    for rank, (was, (begun, said)) in enumerate(zip(stopped, found, strict=True)):
        assert said == []
        assert begun == was
        assert begun["step"] == 4 + rank


def in_turn(rank: int, port: int, folder: Path, resumes: bool, overlap: bool) -> Any:
    """Worker 0 serves, and saves behind its step 9; worker 1 behind its."""
    address = f"127.0.0.1:{port}"
    if rank == 0:
        settings = Settings(tau=4, workers=2, order="round_robin")
        serving = Serving(settings, folder / f"center {resumes}", address=address)
    torch.manual_seed(rank)
    module = Noting(8)
    module.before = lambda: resumes or rank == 0 or until(lambda: told(module), 60)
    fitting = start(
        2,
        [ModelCheckpoint(folder, "{step}", every_n_train_steps=9, save_top_k=-1)],
        EASGDStrategy(center=address, overlap=overlap),
    )
    path = folder / "step=9.ckpt" if resumes else None
    fitting.fit(module, Resumable(rank, 20), ckpt_path=path)
    if rank == 0:
        until(lambda: not serving.handler.server.workers(time.monotonic()), 60)
        serving.close()
    return bits(weights(module)), torch.rand(1).item()


@pytest.mark.multiprocess
@pytest.mark.parametrize("overlap", [True, False])
def test_workers_in_turn_go_on_with_the_bits_of_a_run_that_did_not_stop(
    overlap: bool, tmp_path: Path
) -> None:
    straight, resumed = (
        run_workers(in_turn, free_ports(1), tmp_path, resumes, overlap, workers=2, timeout=80)
        for resumes in (False, True)
    )
    assert straight == resumed


class Hearing:
    """A courier, as far as it hears of checkpoints."""

    def __init__(self, told: Any) -> None:
        self.told_saves, self.saves, self.asked = told, {}, 0

    def ask(self, what: Callable[[], Any]) -> None:
        self.asked += 1

    def beat(self, *, once: bool) -> None:
        """Not called by the tests."""


def put_file(path: Path, save: str) -> None:
    folder = Path(workers_folder(path))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{save}-0.ckpt").touch()


SAVE = "0123456789ab"


@pytest.mark.parametrize(
    "name",
    [
        *("../out.ckpt", "a/../../out.ckpt", "{0}/out.ckpt", "/{0}/out.ckpt", "./last.ckpt"),
        *("a//last.ckpt", "file://{0}/out.ckpt", "a::file://{0}/out.ckpt", "a\nb", "a\\b"),
        *("", "..", "x" * 2000),
    ],
)
def test_what_a_server_says_leads_a_worker_nowhere_else(name: str, tmp_path: Path) -> None:
    name = name.format(tmp_path)
    here = tmp_path / "here"
    for place in (tmp_path / "out.ckpt", here / "last.ckpt", here / "a" / "last.ckpt"):
        put_file(place, SAVE)
    assert Beside(Hearing({name: SAVE}), 1, [str(here)]).due() == []


@pytest.mark.parametrize("save", ["../../abcdef", "0123456789AB", "", None, 7, [SAVE], "f" * 12])
def test_a_worker_writes_beside_a_save_that_is_there_only(save: Any, tmp_path: Path) -> None:
    put_file(tmp_path / "last.ckpt", SAVE)
    assert Beside(Hearing({"last.ckpt": save}), 1, [str(tmp_path)]).due() == []
    there = Beside(Hearing({"last.ckpt": SAVE, 7: SAVE}), 1, [str(tmp_path)])
    assert there.due() == [(f"{tmp_path}/last.ckpt", SAVE)]
    there.answered(there.due())
    assert there.due() == []


def test_a_worker_that_never_sees_a_checkpoint_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_easgd.strategy.beside._PATIENCE", 0.0)
    beside = Beside(Hearing({"a.ckpt": SAVE, "b.ckpt": "f" * 12}), 1, [str(tmp_path)])
    for _ in range(3):
        assert beside.due() == []
        time.sleep(0.01)
    assert caplog.text.count("does not see the checkpoint 'a.ckpt' of worker 0") == 1
    assert "b.ckpt" not in caplog.text


def test_worker_0_tells_the_newest_checkpoints_below_its_folders(tmp_path: Path) -> None:
    courier = Hearing({})
    beside = Beside(courier, 0, [str(tmp_path / "a"), str(tmp_path)])
    for number in range(12):
        beside.made(f"{tmp_path}/a/{number}.ckpt", f"{number:012x}")
    beside.made(str(tmp_path / "b.ckpt"), SAVE)
    beside.made(str(tmp_path / "a" / "9.ckpt"), SAVE)
    beside.removed(str(tmp_path / "a" / "11.ckpt"))
    newest = [*(f"{number}.ckpt" for number in (6, 7, 8, 10)), "b.ckpt", "9.ckpt"]
    assert list(courier.saves) == ["5.ckpt", *newest]
    assert courier.saves["9.ckpt"] == SAVE
    assert courier.asked == 14
    with pytest.warns(UserWarning, match="has the center and worker 0's own state, and no other"):
        beside.made("/elsewhere/c.ckpt", SAVE)
    beside.made("/elsewhere/c.ckpt", SAVE)
