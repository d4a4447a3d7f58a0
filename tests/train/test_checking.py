"""A config is checked without its data as a run would check it."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

from vit_jax import cli
from vit_jax import config as configs
from vit_jax.config import ConfigError, shipped
from vit_jax.train import checking, setup

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.py"
# For the eight devices of the tests.
BASE = [f"--config={TINY}", "--config.batch_size=16", "--config.loss_group_size=2", "--config.data.workers=0"]


def specs() -> list[str]:
  """Every run file with every variant."""
  found = []
  for name in shipped.names():
    found += [name, *(f"{name}:{variant}" for variant in shipped.header(shipped.path_of(name)).variants)]
  return found


@pytest.mark.parametrize("spec", specs())
def test_every_run_file_and_variant_can_be_trained(spec, monkeypatch):
  one = jax.devices()[:1]
  monkeypatch.setattr(setup, "fit", lambda config, num, fit=setup.fit: fit(config, num, one))
  monkeypatch.setattr(setup, "abstract_state", lambda run: None)  # whose shapes take a second each
  config = configs.load(spec, ["distillation.teacher=nowhere"] * spec.endswith("distill"))
  left_out = checking.check(config)
  made = config.data.source.startswith("embedded:")
  assert any(line.startswith("data.source=") for line in left_out) != made


def test_the_shapes_of_a_state_are_made(monkeypatch):
  seen = []
  abstract = setup.abstract_state
  monkeypatch.setattr(setup, "abstract_state", lambda run: seen.append(run) or abstract(run))
  checking.check(configs.load(str(TINY), ["batch_size=16", "loss_group_size=2"]))
  assert len(seen) == 1


@pytest.mark.parametrize(
  "overrides",
  [
    "model.num_heads=5",
    "model.name=dinov3_vits6",
    "model.depths=(1,1,1,1)",
    "model.patch_size=7",
    "model.pool=cls model.class_token=false",
    "crops.global_size=33",
    "crops.local_size=15",
    "crops.resolutions=((32,16,0,0.5),(36,16,0,0.5))",
    "mesh.data=3",
    "mesh.fsdp=3 mesh.data=1",
    "mesh.fsdp=8 mesh.data=1 model.width=36 model.num_heads=1 dino.hidden=36 ibot.hidden=36 model.mlp_hidden=68",
    "batch_size=12",
    "loss_group_size=4",
    "micro_batches=2",
    "koleo.group_size=1",
    "ibot.mask_ratio=(0,0.01)",
    "evaluation.image_size=37",
    "evaluation.test_source=embedded:textures/test",
    "evaluation.train_source=embedded:textures evaluation.test_source=embedded:textures",
    "init_from=nothing/there",
    "gram.source=nothing/there",
    "duration=0.001\N{SPACE}% schedules.lr.warmup=1",
    "gram.source=init gram.load_at=9",
    "method=distillation",
    "batch_size=0",
    "duration=4 schedules.lr.warmup=5",
    "duration=1\N{SPACE}epochs schedules.lr.warmup=5",
    "duration=1e400\N{SPACE}steps",
    "data.source=embedded:textures?sise=32",
    "data.source=embedded:textures?count=0",
    "data.source=embedded:textures/vall",
    "data.source=synthetic:photo?count=-1",
    "data.source=synthetic:foto",
    "model.positions=learned model.rope.base=3 model.position_table.prefix=zork",
  ],
)
def test_what_a_dry_run_refuses_the_look_at_a_config_refuses_in_the_same_words(overrides, tmp_path, capsys):
  flags = [f"--config.{override}" for override in re.split(r" (?=\w+[.=])", overrides)]
  said = []
  for command in (["inspect", "config"], ["train", "--dry_run", f"--workdir={tmp_path}/new"]):
    assert cli.main([*command, *BASE, *flags]) == 2
    out, error = capsys.readouterr()
    assert not out
    said.append(error)
  assert said[0] == said[1]


def test_what_depends_on_the_number_of_images_is_left_to_the_run(capsys):
  for flags in (["--config.duration=1 epochs", "--config.schedules.lr.warmup=5000 steps"],
                ["--config.duration=1000 steps", "--config.schedules.lr.warmup=10 epochs"]):  # fmt: skip
    assert cli.main(["inspect", "config", *BASE, *flags, "--config.data.source=folder:photos"]) == 0
  assert "not checked: data.source=folder:photos: was not opened" in capsys.readouterr().err


DISTILL = ["method=distillation", "distillation.teacher=nowhere", "batch_size=16", "loss_group_size=2"]


def test_a_teacher_that_is_not_there_is_said_and_the_students_are_checked():
  config = configs.load(str(TINY), DISTILL)
  assert "distillation.teacher=nowhere: is not there" in checking.check(config)[0]
  with pytest.raises(ConfigError, match=r"^model\.width=32: must be a multiple of 4 x model\.num_heads"):
    checking.check(configs.load(str(TINY), [*DISTILL, "model.num_heads=5"]))
  students = f"distillation.students=(a={TINY},b={TINY})"
  assert len(checking.check(configs.load(str(TINY), [*DISTILL, students]))) == 1
  with pytest.raises(ConfigError, match="students that share crops and masks must have patches of one size"):
    checking.check(configs.load(str(TINY), [*DISTILL, students, "students.b.model.patch_size=16"]))
  with pytest.raises(ConfigError, match=r"^students\.b\.model\.width=32: "):
    checking.check(configs.load(str(TINY), [*DISTILL, students, "students.b.model.num_heads=5"]))
