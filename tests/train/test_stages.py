"""Stage after stage: a Gram stage that starts from a pretraining run, is stopped, goes on, and is used afterwards."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

import vit_jax
from tests.train.test_loop import tiny
from vit_jax import cli
from vit_jax.checkpoints import restore_params
from vit_jax.train.loop import train

QUICK = {"log.pictures": False, "evaluation.every": "0 steps", "log.tensorboard": False}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
  """A pretraining run, and a Gram stage from it with a head warm-up, loading from an early step, and refreshes."""
  folder = tmp_path_factory.mktemp("stages")
  devices = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *_: devices)
    train(tiny(**QUICK), str(folder / "pretrain"))
    state = train(gram_stage(folder), str(folder / "gram"))
    yield folder, state


def gram_stage(folder, **overrides):
  return tiny(**QUICK | {
    "init_from": str(folder / "pretrain"), "gram.source": str(folder / "pretrain" / "checkpoints" / "2"),
    "gram.refresh.every": "3 steps", "gram.stats": True, "schedules.gram_loss_weight.peak": 2.0,
    "init.freeze_backbone_steps": "2 steps", "schedules.lr.start": 1e-3, "duration": "6 steps",
    "checkpoint.keep": 5, "ibot.prototypes": 48, **overrides,
  })  # fmt: skip


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_losses_are_finite_and_the_gram_term_is_logged(stages):
  folder, state = stages
  logged = lines(folder / "gram")
  assert len(logged) == 6 and all(np.isfinite(list(line.values())).all() for line in logged)
  assert all({"gram", "gram_masked", "gram_unmasked", "gram_loss_weight"} <= set(line) for line in logged)
  assert all(line["gram"] > 0 for line in logged)
  assert int(state.counters["gram_refreshes"]) == 2
  assert not any("gram" in name for line in lines(folder / "pretrain") for name in line)


def test_the_stage_starts_where_the_run_ended_and_is_anchored_to_the_step_that_was_named(stages):
  folder, _ = stages
  early = restore_params(folder / "pretrain", step=2)
  last = restore_params(folder / "pretrain", step=4)
  first_saved = restore_params(folder / "gram", path=("gram_teacher",), step=2)
  for a, b in zip(jax.tree.leaves(first_saved), jax.tree.leaves(early), strict=True):
    np.testing.assert_array_equal(a, b)
  held = restore_params(folder / "gram", step=2)  # by the head warm-up of two steps
  for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(last), strict=True):
    np.testing.assert_array_equal(a, b)
  refreshed = restore_params(folder / "gram", path=("gram_teacher",), step=6)
  teacher = restore_params(folder / "gram", step=6)
  for a, b in zip(jax.tree.leaves(refreshed), jax.tree.leaves(teacher), strict=True):
    np.testing.assert_array_equal(a, b)


def test_it_goes_on_bit_for_bit_from_its_own_checkpoint_and_not_from_init_from(stages, tmp_path):
  folder, expected = stages
  workdir = tmp_path / "gram"
  shutil.copytree(folder / "gram", workdir)
  for step in (4, 6):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  shutil.move(folder / "pretrain", folder / "elsewhere")  # the sources are not needed any more
  try:
    state = train(gram_stage(folder), str(workdir))
  finally:
    shutil.move(folder / "elsewhere", folder / "pretrain")
  plain = lambda s: jax.tree.leaves((s.student, s.teacher, s.gram_teacher, s.opt_state, s.counters))  # noqa: E731
  for a, b in zip(plain(state), plain(expected), strict=True):
    np.testing.assert_array_equal(a, b)
  assert lines(workdir) == lines(folder / "gram")


def test_its_teacher_is_loaded_exported_and_evaluated_as_any_other(stages, tmp_path):
  folder, state = stages
  model, params = vit_jax.load_model(folder / "gram")
  np.testing.assert_array_equal(params["cls_token"], state.teacher["backbone"]["cls_token"])
  assert model.apply({"params": params}, np.zeros((1, 32, 32, 3), np.float32)).patches.shape == (1, 16, 32)
  assert cli.main(["export", f"--model={folder / 'gram'}", f"--to={tmp_path / 'hf'}"]) == 0
  again = vit_jax.load_model(tmp_path / "hf")[1]
  np.testing.assert_array_equal(again["cls_token"], params["cls_token"])
  data = "--data=embedded:textures?size=32&count=64"
  assert cli.main(["evaluate", f"--model={folder / 'gram'}", data, "--max_examples=16"]) == 0
