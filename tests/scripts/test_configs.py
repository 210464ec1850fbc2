"""What the scripts write of configurations holds no secret, and is read as it was meant."""

from __future__ import annotations

import json
import os
from pathlib import Path

import configs
import pytest
from hydra import compose, initialize_config_dir
from jobs import refuse_what_is_gone
from omegaconf import OmegaConf
from processes import run_script

ROOT = Path(__file__).parents[2]
SECRET = "hunter2's \\ ${x}"


@pytest.mark.parametrize(
    "written",
    [
        "${oc.env:EASGD_TOKEN}",
        "https://me:${oc.env:EASGD_TOKEN}@host/${name}",
        "${other}",
        "${oc.env:EASGD_NONE,${oc.env:EASGD_TOKEN}}",
        """${oc.env:EASGD_NONE,"it's"}""",
        r"${oc.env:EASGD_NONE,'a \'b\' \\'}",
        "${oc.env:EASGD_NONE,null}",
        "${oc.env:EASGD_NONE,7}",
        "${oc.decode:${oc.env:EASGD_NUMBER,4}}",
        "${oc.decode:${oc.env:EASGD_NONE,4}}",
        "${oc.decode:'[1, 2]'}",
        "${name}",
    ],
)
def test_the_environment_stays_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("EASGD_TOKEN", SECRET)
    monkeypatch.setenv("EASGD_NUMBER", "8123")
    monkeypatch.delenv("EASGD_NONE", raising=False)
    cfg = OmegaConf.create(
        {"name": "x", "other": "${oc.env:EASGD_TOKEN}", "deep": [{"value": written}]}
    )
    configs.save(cfg, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "hunter2" not in text
    assert "8123" not in text
    assert "${name}" not in text
    read = OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"), resolve=True)
    assert read == OmegaConf.to_container(cfg, resolve=True)
    assert read["other"] == SECRET


def test_no_file_of_a_run_holds_what_the_environment_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EASGD_TOKEN", "hunter2")
    own = ["+data.token=${oc.env:EASGD_TOKEN}", "+data.again=${data.token}"]
    overrides = ["trainer.devices=1", *own]
    script = ROOT / "scripts" / "train.py"
    printed = run_script(script, overrides, folder=tmp_path, workers=None, code=1)
    assert "unexpected keyword argument 'token'" in printed
    written = [path for path in tmp_path.rglob("config.yaml") if path.parent.name != ".hydra"]
    assert "again: ${oc.env:EASGD_TOKEN}" in written[0].read_text()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


def test_results_of_comparisons_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASGD_TOKEN", "hunter2")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("compare", ["+data.folder=${oc.env:EASGD_TOKEN}", "data.seed=3"])
    assert "hunter2" not in json.dumps(configs.resolved(cfg)["data"])
    assert os.environ["EASGD_TOKEN"] == OmegaConf.to_container(cfg, resolve=True)["data"]["folder"]


@pytest.mark.parametrize("argument", ["strategy.tau_min=2", "+strategy.tau_max=2"])
def test_a_key_of_earlier_configurations_is_told_what_to_write(argument: str) -> None:
    with pytest.raises(SystemExit, match=r"Write vary=auto strategy\.tau\.(min|max)=2 instead"):
        refuse_what_is_gone(["model=mlp", argument])
    refuse_what_is_gone(["model=mlp", "vary=auto", "strategy.tau.min=2"])
