import inspect
import re
from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from omegaconf import OmegaConf
from plugging import READ, needed, several
from torch import nn

from lightning_easgd import EASGDStrategy

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
KINDS = {
    "data": LightningDataModule,
    "module": LightningModule,
    "model": nn.Module,
    "optimizer": partial,
    "strategy": Strategy,
}

WITHOUT_A_CLASS = {"own", "none"}


def of(group):
    names = [name for kind, name in CHOICES if kind == group]
    return [name for name in names if name not in WITHOUT_A_CLASS]


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("cat", "dog"):  # what data=image_folder counts
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield composed


@cache  # most of a test's time; no test changes what it gets
def composed(*overrides):
    return compose("train", overrides=["output_dir=.", *overrides])


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in KINDS for name in of(group)]
)
def test_every_choice_is_what_its_group_says(config, group, name):
    data = {"convnet7": ["data=cifar10"], "gpt": ["data=text"]}.get(name, [])
    made = instantiate(config(f"{group}={name}", *data)[group])
    assert isinstance(made, KINDS[group])


@pytest.mark.parametrize("name", of("logger"))
def test_every_logger_takes_what_its_file_says(config, name):
    # Without what makers of loggers want installed: two of them want much.
    made = config(f"logger={name}").logger[name]
    arguments = {str(key): value for key, value in made.items() if key != "_target_"}
    logger = get_class(made._target_)
    assert issubclass(logger, Logger)
    assert set(arguments) <= set(inspect.signature(logger).parameters)


@pytest.mark.parametrize("names", ["none", "csv", "tensorboard", "[csv,tensorboard]"])
def test_a_trainer_takes_the_strategy_and_any_loggers(config, names):
    cfg = config("strategy=single", f"logger={names}")
    strategy, loggers = instantiate(cfg.strategy), several(cfg.logger)
    trainer = instantiate(cfg.trainer, strategy=strategy, logger=loggers or False)
    assert isinstance(trainer, Trainer)
    assert trainer.strategy is strategy
    assert all(isinstance(logger, Logger) for logger in loggers)
    assert trainer.loggers == loggers
    assert len(loggers) == (0 if names == "none" else len(names.split(",")))


def test_several_callbacks_are_taken_together_and_each_can_be_set(config):
    names = of("callbacks")
    cfg = config(f"callbacks=[{','.join(names)}]", "callbacks.early_stopping.patience=7")
    made = several(cfg.callbacks)
    assert len(made) == len(names)
    assert all(isinstance(callback, Callback) for callback in made)
    assert cfg.callbacks.early_stopping.patience == 7
    assert several(config().callbacks) == []


def test_every_argument_of_the_checkpoint_can_be_set_and_errors_leave_one(config):
    arguments = set(inspect.signature(ModelCheckpoint.__init__).parameters) - {"self"}
    assert arguments == set(config().checkpoint) - {"_target_"}
    assert config().checkpoint.save_on_exception


def test_every_argument_of_the_trainer_is_set_or_has_a_group_or_is_not_for_this(config):
    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    elsewhere = {"strategy", "logger", "callbacks"}
    unused = {"barebones", "limit_predict_batches", "enable_autolog_hparams", "model_registry"}
    assert arguments - elsewhere - unused == set(config().trainer) - {"_target_"}


@pytest.mark.parametrize("name", of("debug"))
def test_every_debugging_makes_a_trainer(config, name):
    cfg = config(f"debug={name}", "strategy=single")
    assert isinstance(instantiate(cfg.trainer, logger=False), Trainer)
    assert cfg.trainer != config("strategy=single").trainer


@pytest.mark.parametrize("name", of("experiment"))
def test_every_experiment_can_be_built(config, name):
    cfg = config(f"experiment={name}")
    alone = name in ("paper_sgd", "paper_msgd")
    kind = SingleDeviceStrategy if alone else EASGDStrategy
    assert isinstance(instantiate(cfg.strategy), kind)
    assert cfg.trainer.devices == (1 if alone else 4)
    assert isinstance(instantiate(cfg.module), LightningModule)
    assert isinstance(instantiate(cfg.data), LightningDataModule)
    own = OmegaConf.load(CONF / "experiment" / f"{name}.yaml").get("strategy", {})
    other = config(f"experiment={name}", "strategy=ddp", *(f"~strategy.{key}" for key in own))
    assert isinstance(instantiate(other.strategy), DDPStrategy)
    assert other.optimizer == cfg.optimizer


IMAGES = [name for name in of("data") if name != "text"]
CLASSIFIERS = [name for name in of("model") if name != "gpt"]


@pytest.mark.parametrize(("model", "data"), [*product(CLASSIFIERS, IMAGES)])
def test_every_model_takes_every_set_that_is_large_enough(config, model, data):
    cfg = config(f"model={model}", f"data={data}")
    images = torch.rand(2, cfg.data.in_channels, cfg.data.image_size, cfg.data.image_size)
    if model == "convnet7" and data == "digits":
        with pytest.raises(Exception, match=r"image_size=8; allowed is 24"):
            instantiate(cfg.module)
        return
    module = instantiate(cfg.module)
    assert module(images).shape == (2, instantiate(cfg.data).num_classes)


def test_the_classes_of_folders_are_counted_unless_their_number_is_typed(config):
    folders = "data=image_folder"
    module = instantiate(config(folders).module)
    assert (module.net[-1].out_features, module.test_accuracy.num_classes) == (2, 2)
    assert instantiate(config(folders).data).num_classes == 2
    assert instantiate(config(folders, "data.num_classes=7").module).net[-1].out_features == 7
    with pytest.raises(Exception, match=r"searched was nowhere/train.*Lay it out as"):
        instantiate(config(folders, "data.root=nowhere").module)


@pytest.mark.parametrize("name", of("optimizer"))
def test_every_optimizer_takes_the_parameters(config, name):
    make = instantiate(config(f"optimizer={name}").optimizer)
    optimizer = make(nn.Linear(2, 2).parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_eamsgd_is_easgd_with_nesterov_momentum(config):
    cfg = config("strategy=eamsgd")
    assert cfg.strategy == config("strategy=easgd").strategy
    assert cfg.optimizer == config("optimizer=nesterov").optimizer


def test_a_text_chooses_what_predicts_bytes_unless_the_command_line_does(config):
    cfg = config("data=text")
    for group, choice in (("module", "language"), ("optimizer", "adamw"), ("model", "gpt")):
        chosen = config("data=text", f"{group}={choice}")
        assert cfg == chosen
    assert cfg.trainer == config("trainer=one_epoch").trainer
    assert cfg.trainer.max_epochs == 1
    logits = instantiate(cfg.module)(torch.zeros(2, cfg.data.context, dtype=torch.int64))
    assert logits.shape == (2, cfg.data.context, 256)
    assert config("data=text", "trainer.max_epochs=3").trainer.max_epochs == 3
    assert config("data=text", "trainer=default").trainer == config().trainer
    assert config("data=text", "optimizer=sgd").optimizer == config().optimizer
    assert (
        config("data=text", "strategy=eamsgd").optimizer == config("optimizer=nesterov").optimizer
    )


def test_the_command_line_has_the_last_word_on_eamsgd(config):
    cfg = config("strategy=eamsgd", "optimizer.lr=0.01", "strategy.tau=4")
    assert (cfg.optimizer.lr, cfg.optimizer.nesterov, cfg.strategy.tau) == (0.01, True, 4)
    assert "nesterov" not in config("strategy=eamsgd", "optimizer=adamw").optimizer


@pytest.mark.parametrize("strength", ["beta=0.5", "alpha=0.1", "rho=0.5"])
def test_easgd_takes_one_strength(config, strength):
    cfg = config("strategy.tau=16", f"strategy.{strength}")
    assert isinstance(instantiate(cfg.strategy), EASGDStrategy)


@pytest.mark.parametrize("name", of("vary"))
def test_every_schedule_sets_a_parameter_of_the_strategy(config, name):
    rule = ["strategy=diloco"] if name == "outer_cosine" else []
    plain, varied = config(*rule).strategy, config(*rule, f"vary={name}").strategy
    (changed,) = [key for key in plain if plain[key] != varied[key]]
    target = (varied[changed].get("outer_lr") or varied[changed])["_target_"]
    strategy = instantiate(varied)
    assert isinstance(strategy, EASGDStrategy)
    rules = strategy.options.rules
    target = {"lightning_easgd.Auto": "AutomaticPeriod"}.get(target, target)
    kinds = {type(s).__name__ for s in rules.schedules._named.values()} | {"Constant"}
    assert kinds == {"Constant", target.rpartition(".")[2]}


def test_schedules_are_taken_together_and_the_command_line_has_the_last_word(config):
    cfg = config("vary=[linear,consensus_target]", "strategy.tau=4", "strategy.beta.target=0.2")
    assert cfg.strategy.tau == 4
    assert cfg.strategy.beta.target == 0.2
    assert config("vary=cosine", "schedule=constant").schedule == "constant"


def test_single_runs_one_process_on_the_accelerator(config):
    cfg = config("strategy=single")
    assert cfg.trainer.devices == 1
    strategy = instantiate(cfg.strategy)
    assert isinstance(strategy, SingleDeviceStrategy)
    assert strategy.root_device == torch.device("cpu")
    gpu = config("strategy=single", "trainer.accelerator=cuda")
    assert instantiate(gpu.strategy).root_device == torch.device("cuda:0")


PAPER = {
    "easgd": (10, None),
    "eamsgd": (10, 0.99),
    "downpour": (1, None),
    "adownpour": (1, None),
    "mvadownpour": (1, None),
    "mdownpour": (1, None),
    "sgd": (None, None),
    "msgd": (None, 0.99),
}
"""The paper's methods: τ, and the momentum of the workers."""


@pytest.mark.parametrize("name", PAPER)
def test_the_experiments_of_the_paper_have_the_numbers_of_the_paper(config, name):
    cfg = config(f"experiment=paper_{name}")
    data, strategy = cfg.data, instantiate(cfg.strategy)
    assert (data.augment, data.image_size, data.batch_size) == ("crop_flip", 28, 128)
    assert (data.sampling, cfg.optimizer.weight_decay) == ("whole", 1e-4)
    assert (cfg.schedule, cfg.model.image_size) == ("constant", 28)
    assert (cfg.strategy.get("tau"), cfg.optimizer.get("momentum")) == PAPER[name]
    if isinstance(strategy, EASGDStrategy):
        assert strategy.options.rule_name == name.replace("eamsgd", "easgd")
    assert cfg.trainer.max_epochs == 60


def test_experiments_choose_a_period_that_strategies_without_one_ignore(config):
    fashion = "experiment=fashion_mnist"
    names = ("parity", "easgd", "eamsgd")
    found = [config(fashion, f"strategy={name}").strategy.tau for name in names]
    assert found == [16, 16, 16]
    assert config(fashion, "strategy.tau=4").strategy.tau == 4
    assert config(fashion, "tau=4").strategy.tau == 4
    assert config().strategy.tau is None  # 10, or what a server has
    for name, kind in (("ddp", DDPStrategy), ("single", SingleDeviceStrategy)):
        assert isinstance(instantiate(config(fashion, f"strategy={name}").strategy), kind)


def test_an_elastic_run_takes_its_size_from_torchrun(config, monkeypatch):
    alone = config("experiment=elastic").trainer
    assert (alone.devices, alone.num_nodes) == (4, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    started = config("experiment=elastic").trainer
    assert (started.devices, started.num_nodes) == (2, 3)


def test_a_misspelt_experiment_is_refused(config):
    with pytest.raises(Exception, match="misspelt"):
        config("experiment=misspelt")


def test_all_keys_are_read_and_only_those_that_are_can_be_set(config):
    cfg = config()
    assert set(needed(cfg, [])) == set(cfg)
    own = ["module=own", "module._target_=my.Lit", "data=none"]
    assert set(needed(config(*own), own)) == {*READ, "tau"} & set(cfg)
    for typed in (["model=mlp"], ["optimizer.lr=1"], ["schedule=constant"], ["+foo=3"]):
        with pytest.raises(ValueError, match=r"was set, but nothing reads it"):
            needed(config(*own, *typed), [*own, *typed])
    handed = [*own, "model=mlp", "+module.net=${model}"]
    assert "model" in needed(config(*handed), handed)
    assert "tau" not in needed(config("strategy=ddp"), ["strategy=ddp", "tau=4"])


@pytest.mark.parametrize("key", ["strategy", "logger"])
def test_what_a_trainer_gets_from_a_group_is_refused_in_it(config, key):
    typed = [f"+trainer.{key}=ddp"]
    with pytest.raises(ValueError, match=rf"trainer\.{key} is not allowed.*Write {key}=NAME"):
        needed(config(*typed), typed)


UNITS = r"""(?x) [αβδζηκλμρτ] | ^\#\ [adLp], | learning\ rate | fraction | pixel
| \b(?: seconds | steps? | epochs | passes | batch(?:es)? | images | layers | channels
       | exchanges | elements | validations | checkpoints | parts | ports | bytes | windows | tokens
       | units | blocks | heads | runs | jobs | nodes | cores | minutes | workers )\b"""
SAYS_ALL = {
    *("dropout", "factor", "hosts", "in_channels", "lr_drop", "min_delta", "num_classes"),
    *("num_nodes", "num_workers", "repetitions", "seed", "seeds", "target", "threads"),
    *("weight_decay",),
}
"""Keys of numbers that have neither a unit nor a letter."""


def numbers(text):
    """Keys of numbers, with the comment above or behind each."""
    comment = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#"):
            comment += line
            continue
        if number := re.match(r"(\w+): *-?[\d.]+(?:e-?\d+)?(?: +(#.*))?$", line):
            yield number[1], comment + (number[2] or "")
        comment = ""


def test_a_number_says_its_unit_or_its_letter_in_the_paper():
    files = {path.relative_to(CONF): list(numbers(path.read_text())) for path in FILES}
    found = [(str(path), *number) for path, keys in files.items() for number in keys]
    silent = [
        (path, key)
        for path, key, comment in found
        if key not in SAYS_ALL and not re.search(UNITS, comment, re.I)
    ]
    assert silent == [("strategy/single.yaml", "devices")]  # one process, as its name says
    assert {key for _, key, _ in found} >= SAYS_ALL
