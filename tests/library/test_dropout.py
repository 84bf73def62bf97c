"""Training without dropout: which layers are found, for how long, and what a run says of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, output_tensors
from torch import nn
from trainer_tester import IN_PLACE, WAYS, prepared, trainer_for
from transformers import PretrainedConfig, TrainerCallback

from bitfit_hf import BitFitCallback
from bitfit_hf.trainer.dropout import WithoutDropout

RATE = 0.25
WITHOUT = {"mixtral", "convnext", "mamba", "mamba2"}  # they have no dropout, whatever is asked for
ONE_OF_EACH_FAMILY = {arch.family: arch for arch in reversed(ARCHITECTURES.values()) if arch.is_transformers}


def rates_of(config: PretrainedConfig) -> list[str]:
    return [name for name, value in vars(config).items() if "drop" in name and isinstance(value, (int, float))]


def with_dropout(arch: Architecture) -> nn.Module:
    """The architecture with every rate of its configuration above zero, in training mode."""
    model = arch.build()
    config = copy.deepcopy(model.config)
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]
    for part in parts:
        for name in rates_of(part):
            setattr(part, name, RATE)
    return type(model)(config).train()


def outputs(model: nn.Module, arch: Architecture, seed: int) -> list[torch.Tensor]:
    inputs = arch.inputs()
    torch.manual_seed(seed)
    with torch.no_grad():
        return output_tensors(model(**inputs))


def same(model: nn.Module, arch: Architecture) -> bool:
    """Whether two forward passes with different random numbers have one result."""
    pairs = list(zip(outputs(model, arch, 1), outputs(model, arch, 2)))
    assert pairs
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("arch", ONE_OF_EACH_FAMILY.values(), ids=str)
def test_nothing_is_left_to_chance(arch):
    model = with_dropout(arch)
    before = copy.deepcopy(model.config.to_dict())
    assert same(model, arch) == (arch.family in WITHOUT)
    held = WithoutDropout(model)
    assert same(model, arch)
    assert model.config.to_dict() == before
    held.remove()
    held.remove()
    assert same(model, arch) == (arch.family in WITHOUT)


class Rates(TrainerCallback):
    """The rates of the model's dropouts at every step."""

    def __init__(self) -> None:
        self.seen: set[float] = set()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen |= rates(model)


def rates(model: nn.Module) -> set[float]:
    return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropout", [False, True])
def test_while_a_trainer_trains(way: str, dropout: bool, tmp_path: Path):
    model = prepared(way, dropout=RATE)
    seen = Rates()
    callback = BitFitCallback(dropout=dropout)
    trainer = trainer_for(model, tmp_path, callback, seen)
    assert rates(model) == {RATE}
    trainer.train()
    assert seen.seen == ({RATE} if dropout else {0.0})
    assert rates(model) == {RATE}
    used = model.peft_config["default"].run.hyperparameters
    assert used["dropout"] == ("the model's own" if dropout else "none")


def test_a_run_that_was_broken_off_leaves_nothing_behind_for_the_next(tmp_path: Path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = prepared(IN_PLACE, dropout=RATE)
    callback, stop = BitFitCallback(), Stop()
    trainer = trainer_for(model, tmp_path, callback, stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train()
    assert rates(model) == {RATE}
