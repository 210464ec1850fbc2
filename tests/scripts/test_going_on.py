"""A run that was stopped or has failed says how far it came, and the command that goes on."""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from going_on import command
from hydra.core.override_parser.overrides_parser import OverridesParser
from processes import end_by, forked_until_written, processes_of, run_script
from waiting import until

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
SHORT = [
    *("model=mlp", "data.batch_size=64", "strategy.tau=4", "trainer.devices=2"),
    *("trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"),
    *("trainer.log_every_n_steps=1", "checkpoint.every_n_epochs=null"),
    "checkpoint.every_n_train_steps=5",
]
MY = """
import os
import signal
from pathlib import Path

import lightning.pytorch as pl


class Once(pl.Callback):
    \"\"\"Something happens to worker 1 after a step, the first time.\"\"\"

    def __init__(self, what, step):
        self.what, self.step = what, step

    def on_train_batch_end(self, trainer, *_):
        happened = Path("happened")
        if trainer.global_rank == 1 and trainer.global_step == self.step and not happened.exists():
            happened.touch()
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise LookupError(f"no picture\\nin step {self.step}")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my.py").write_text(MY)
    return tmp_path


def train(folder: Path, *overrides: str, code: int = 0) -> str:
    return run_script(SCRIPT, [*SHORT, *overrides], folder=folder, workers=None, code=code)


def told(printed: str) -> dict[str, str]:
    """What the lines below an error say, by their names."""
    return dict(re.findall(r"^  (reached|checkpoint|to go on|traceback) +(.*)$", printed, re.M))


def steps_of(run: Path) -> list[tuple[str, str]]:
    """The steps in the table of curves, and the losses that were logged for them."""
    with (run / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [(row["step"], row["train/loss"]) for row in rows if row["train/loss"]]


def test_a_failed_run_goes_on_in_its_folder_and_its_curves(folder: Path) -> None:
    two_epochs = ["trainer.max_epochs=2", "checkpoint.save_on_exception=false"]
    train(folder, *two_epochs, "hydra.run.dir=straight")
    once = ["callbacks.once._target_=my.Once", "callbacks.once.what=fail", "callbacks.once.step=14"]
    run = folder / "it's a run, a=b"
    printed = train(folder, *two_epochs, *once, f'hydra.run.dir="{run}"', code=1)
    assert printed.count("error: worker 1 failed: LookupError: no picture in step 14\n") == 1
    assert "Traceback" not in printed
    found = told(printed)
    assert found["reached"] in ("step 13", "step 14", "step 15", "step 16")  # worker 0
    assert "no picture" in Path(found["traceback"]).read_text()
    assert found["checkpoint"] == f"{run}/checkpoints/last.ckpt, step 10"
    python, script, *arguments = shlex.split(found["to go on"])
    assert (python, script) == ("python", str(SCRIPT))
    printed = run_script(SCRIPT, arguments, folder=folder, workers=None)
    assert printed.count("Training goes on from step 10.") == 1
    assert "Warning" not in printed
    assert steps_of(run) == steps_of(folder / "straight")


def test_a_killed_worker_is_the_cause_and_not_who_misses_it(folder: Path) -> None:
    once = ["callbacks.once._target_=my.Once", "callbacks.once.what=kill", "callbacks.once.step=14"]
    printed = train(folder, *once, "trainer.max_epochs=2", "hydra.run.dir=run", code=1)
    killed = "error: worker 1 was killed by signal 9 (out of memory? see dmesg)\n"
    assert printed.count(killed) == 1
    assert "Traceback" not in printed
    assert told(printed)["checkpoint"].startswith(f"{folder}/run/checkpoints/last.ckpt, step ")


def stopped_as_typed(
    number: signal.Signals, arguments: list[str], checkpoint: Path, folder: Path
) -> tuple[int, str]:
    """The exit code and messages of a run that gets a signal when it has a checkpoint."""
    command = [sys.executable, str(SCRIPT), *arguments]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, text=True, **streams) as process:
        try:
            until(checkpoint.exists, 120)
            assert len(processes_of(folder)) == 3  # with the one that was typed
            process.send_signal(number)
            return process.wait(timeout=60), process.stderr.read()
        finally:
            process.kill()


def stopped_when_forked(
    number: signal.Signals, arguments: list[str], checkpoint: Path, folder: Path
) -> tuple[int, str]:
    """The same without imports."""
    with forked_until_written(checkpoint, SCRIPT, arguments, folder) as script_alone:
        assert len(processes_of(folder)) == 3
        return end_by(number, script_alone)


@pytest.mark.parametrize(
    ("number", "code", "how"),
    [(signal.SIGINT, 130, "by Ctrl-C"), (signal.SIGTERM, 143, "by SIGTERM")],
)
def test_a_stopped_run_says_the_step_the_checkpoint_and_the_command(
    tmp_path: Path, number: signal.Signals, code: int, how: str
) -> None:
    run = tmp_path / "run"
    arguments = [*SHORT, "trainer.max_epochs=9999", f"hydra.run.dir={run}"]
    checkpoint = run / "checkpoints" / "last.ckpt"
    stop = stopped_as_typed if number == signal.SIGINT else stopped_when_forked
    found_code, printed = stop(number, arguments, checkpoint, tmp_path)
    assert found_code == code
    assert processes_of(tmp_path) == {}
    assert f"The run was stopped {how}.\n" in printed
    assert (run / "stopped.log").read_text() in printed
    found = told(printed)
    reached = int(found["reached"].removeprefix("step "))
    assert found["checkpoint"] == f"{checkpoint}, step {reached}"  # one was written at the end
    assert found["to go on"].endswith(f"ckpt_path={checkpoint} hydra.run.dir={run}")
    assert "Traceback" not in printed


def test_the_installed_command_is_its_own_program() -> None:
    typed = command("/bin/easgd-train", [], ["tau=4"], Path("/run/last.ckpt"), Path("/run"))
    assert typed == "/bin/easgd-train tau=4 ckpt_path=/run/last.ckpt hydra.run.dir=/run"


@pytest.mark.parametrize("name", ["run", "it's a run, a=b", 'a"b\\c', "$x"])
def test_the_command_is_read_as_the_folder_it_names(name: str) -> None:
    folder = Path("/runs") / name
    typed = command(
        *("train.py", ["--config-dir", "files"]),
        ["tau=4", "ckpt_path=old.ckpt", "hydra.run.dir=old", 'callbacks=["a b"]'],
        *(folder / "last.ckpt", folder),
    )
    python, script, *arguments = shlex.split(typed)
    assert [python, script, *arguments[:2]] == ["python", "train.py", "--config-dir", "files"]
    parsed = OverridesParser.create().parse_overrides(arguments[2:])
    values = {each.key_or_group: each.value() for each in parsed}
    assert values == {
        "tau": 4,
        "callbacks": ["a b"],
        "ckpt_path": os.fspath(folder / "last.ckpt"),
        "hydra.run.dir": os.fspath(folder),
    }
