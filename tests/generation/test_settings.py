"""The sampler of a checkpoint and a command line."""

import dataclasses
import inspect

import pytest
import yaml

import ddt
from ddt.cli import CONF
from ddt.config import parse
from ddt.errors import UserError
from ddt.generation.settings import SamplerOverrides, SampleSettings
from ddt.sampling.settings import SamplerSettings

STORED = {"solver": "sde", "num_steps": 6, "sde_last": "euler", "cfg_interval": [0.3, 1.0], "recompute": "uniform:2"}


def test_checkpoint_keeps_what_is_stored_and_null_is_a_value():
    assert SamplerOverrides().resolve(STORED, True) == SamplerSettings(**STORED | {"cfg_interval": (0.3, 1.0)})
    chosen = SamplerOverrides(cfg_interval=None, recompute=None, num_steps=9).resolve(STORED, True)
    assert (chosen.cfg_interval, chosen.recompute, chosen.num_steps, chosen.solver) == (None, None, 9, "sde")


def test_every_setting_of_the_sampler_can_be_chosen_for_a_sample():
    """By the command, its YAML and ddt.sample, whose defaults are those of `SamplerSettings`."""
    settings = {field.name: field.default for field in dataclasses.fields(SamplerSettings)}
    names = settings.keys() - {"solver"} | {"sampler"}
    assert {field.name for field in dataclasses.fields(SamplerOverrides)} == names
    written = yaml.safe_load((CONF / "sample" / "sample.yaml").read_text())
    assert {name: written.get(name) for name in names} == dict.fromkeys(names, "checkpoint")
    arguments = inspect.signature(ddt.sample).parameters
    assert {name: arguments[name].default for name in settings} == settings


def test_stored_settings_without_effect_beside_the_chosen_ones_are_ignored():
    assert SamplerOverrides(sampler="heun").resolve(STORED, True).sde_last == "mean"
    forecast = STORED | {"solver": "euler", "sde_last": "mean", "forecast_order": 1}
    assert SamplerOverrides(recompute=None).resolve(forecast, True).forecast_order == 0
    adaptive = SamplerOverrides(sampler="adaptive").resolve(STORED, True)
    assert (adaptive.recompute, adaptive.sde_last) == (None, "mean")
    with pytest.raises(UserError, match=r"^sde_last=euler: has no effect with sampler=heun"):
        SamplerOverrides(sampler="heun", sde_last="euler").resolve(STORED, True)


def test_an_end_before_one_replaces_a_stored_last_step():
    stored = {"num_steps": 4, "last_step": 0.04}
    chosen = SamplerOverrides(t_end=0.9).resolve(stored, True)
    assert (chosen.t_end, chosen.last_step) == (0.9, None)
    assert SamplerOverrides(t_end=1.0).resolve(stored, True).last_step == 0.04
    ending = {"num_steps": 4, "last_step": None, "t_end": 0.999, "timeshift": 2.0}
    assert SamplerOverrides().resolve(ending, True) == SamplerSettings(**ending)
    for last_step in (SamplerOverrides(last_step=0.04), SamplerOverrides(last_step=0.04, t_end=0.9)):
        with pytest.raises(UserError, match=r"^last_step=0\.04: has no effect with t_end=0\.9"):
            last_step.resolve(ending, True)
    adaptive = SamplerOverrides(sampler="adaptive", timeshift=3.0).resolve(ending, True)
    assert adaptive.grid() == [0.0, pytest.approx(0.999 / (0.999 + 0.001 * 3), rel=1e-6)]
    with pytest.raises(UserError, match=r"^timeshift=3\.0: sampler=adaptive chooses its own steps"):
        SamplerOverrides(sampler="adaptive", timeshift=3.0).resolve(stored, True)


def test_all_problems_are_reported_at_once_by_the_names_of_the_command():
    with pytest.raises(UserError) as error:
        parse(SampleSettings, {"ckpt": "x", "num_steps": True, "cfg_scale": "much", "sampler": "heun"})
    assert str(error.value).splitlines() == [
        "num_steps=true: give a number",
        "cfg_scale=much: give a number or 'checkpoint'",
    ]
    with pytest.raises(UserError, match=r"^sampler=rk9: unknown solver, choose from euler, "):
        SamplerOverrides(sampler="rk9").resolve(STORED, True)
    with pytest.raises(UserError, match=r"^recompute=uniform:2: this model has no encoder to share; give null"):
        SamplerOverrides().resolve(STORED, False)
