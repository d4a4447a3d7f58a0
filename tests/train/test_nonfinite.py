"""A run that is no longer finite stops, and leaves what shows where it went wrong."""

from __future__ import annotations

import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.jobs import ROOT
from tests.train.test_loop import one_device, tiny  # noqa: F401  (a fixture)
from vit_jax import cli
from vit_jax.checkpoints import restore_params, steps
from vit_jax.config import UserError
from vit_jax.train import loop
from vit_jax.train.nonfinite import Guard, dump, how_to_go_on

FINITE = {"evaluation.every": "0 steps", "checkpoint.every": "50 steps", "log.every": 50}


class Counts:
  """Stands for a state: only the counters count."""

  def __init__(self, nonfinite):
    self.counters = {"nonfinite": jnp.int32(nonfinite)}


def stops_at(counts, limit, before=0):
  guard = Guard(limit, Counts(before))
  return next((i for i, count in enumerate(counts) if guard.reached({"nonfinite": jnp.int32(count)})), None)


def test_the_guard_counts_every_step_in_a_row():
  assert stops_at([0, 1, 2, 3, 4], limit=3) == 3
  assert stops_at([0, 1, 2, 0, 1, 2], limit=3) is None
  assert stops_at([0, 1], limit=1) == 1
  assert stops_at([3], limit=3, before=2) == 0  # a resumed run goes on counting


def test_the_guard_waits_for_a_running_step_only_if_it_may_be_the_last():
  class Running:
    def __int__(self):
      raise AssertionError("waited for a step that may still run")

  guard = Guard(3, Counts(0))
  assert not guard.reached({"nonfinite": jnp.int32(0)})
  assert not guard.reached({"nonfinite": Running()})


def test_several_students_are_watched_alike():
  guard = Guard(2, Counts(0))
  assert not guard.reached({"small/nonfinite": jnp.int32(1), "large/nonfinite": jnp.int32(0)})
  assert guard.reached({"small/nonfinite": jnp.int32(2), "large/nonfinite": jnp.int32(0)})


def poisoned(monkeypatch, path, index):
  """Runs start from a state with a NaN at this place."""
  whole = loop.fresh_state

  def fresh_state(run):
    state = whole(run)
    student = jax.tree_util.tree_map_with_path(
      lambda p, x: x.at[index].set(jnp.nan) if jax.tree_util.keystr(p, simple=True, separator="/") == path else x,
      state.student,
    )
    return state.replace(student=student)

  monkeypatch.setattr(loop, "fresh_state", fresh_state)


@pytest.mark.slow
def test_a_poisoned_run_stops_and_its_replay_names_the_parameter_and_the_layer(
  tmp_path,
  monkeypatch,
  one_device,  # noqa: F811
  capsys,
):
  poisoned(monkeypatch, "backbone/blocks/mlp/fc1/kernel", (1, 0, 0))
  with pytest.raises(UserError) as error:
    loop.train(tiny(**FINITE, **{"duration": "50 steps"}), str(tmp_path / "run"))
  folder = tmp_path / "run" / "nonfinite" / "3"
  assert "step 3: the loss or a gradient was not finite 3 times in a row" in str(error.value)
  assert f"vit-jax replay {folder}\n" in str(error.value)
  assert steps(tmp_path / "run") == () and steps(folder) == (2,)
  with np.load(folder / "batch.npz") as batch:
    assert batch["global_crops"].dtype == np.uint8 and batch["global_crops"].shape[0] == 8

  assert cli.main(["replay", str(folder)]) == 0
  text = capsys.readouterr().out
  assert text.startswith("step 3, made again on 1 ")
  assert re.search(r"student/backbone/blocks/mlp/fc1/kernel, layer 1: 1 of \d+\n", text)
  assert re.search(r"loss +nan +<--", text) and re.search(r"grad_norm/backbone +nan +<--", text)
  assert "first value that is not finite\n  student/blocks[1]/mlp/fc1: dot_general\n" in text


@pytest.mark.slow
def test_the_advice_after_a_stop_are_flags_that_go_on(tmp_path, monkeypatch, one_device, capsys):  # noqa: F811
  make_step = loop.make_step

  def make(run, views):
    """A step that loses its parameters after step 4, unless the peak is lower."""
    step, fatal = make_step(run, views), run.config.schedules.lr.peak > 5e-4

    def broken(state, batch):
      factor = jnp.where(fatal & (state.step >= 4), jnp.nan, 1.0)
      return step(state.replace(student=jax.tree.map(lambda x: x * factor, state.student)), batch)

    return broken

  monkeypatch.setattr(loop, "make_step", make)
  settings = FINITE | {"checkpoint.every": "2 steps", "duration": "8 steps", "log.pictures": "False"}
  command = ["train", f"--config={ROOT}/configs/tiny.py", *(f"--config.{k}={v}" for k, v in settings.items())]
  command += ["--config.mesh.data=1", "--config.optim.max_nonfinite=2", f"--workdir={tmp_path / 'run'}"]
  assert cli.main(command) == 2
  said = capsys.readouterr().err
  assert "go on from step 4, the last saved" in said
  same, fresh = (line.split()[1:] for line in said.splitlines() if "lr.peak=" in line)
  monkeypatch.chdir(tmp_path)
  assert cli.main([*command, *fresh]) == 0
  assert steps(tmp_path / "OTHER")[-1] == 8
  assert f"{tmp_path}/run/checkpoints/2" in (tmp_path / "OTHER" / "config.json").read_text()
  assert cli.main([*command, *same]) == 0
  assert steps(tmp_path / "run")[-1] == 8


@flax.struct.dataclass
class Small:
  """As much of a state as is left behind."""

  step: jax.Array
  counters: dict
  params: dict

  def saved(self):
    return self


def test_a_step_that_is_given_up_again_leaves_its_own_state(tmp_path):
  for value in (1.0, 2.0):
    state = Small(jnp.int32(3), {"nonfinite": jnp.int32(1)}, {"x": jnp.float32(value)})
    folder = dump(tmp_path, 3, state, {"x": jnp.ones(2)}, 0, {}, tiny())
    assert float(restore_params(folder, path=("params",))["x"]) == value


def test_without_a_saved_step_the_advice_is_to_begin_again(tmp_path):
  text = how_to_go_on(tmp_path, 1e-3)
  assert text.startswith("No step was saved") and "--accept_config_change --config.schedules.lr.peak=0.0005" in text
  assert "init_from" not in text


def test_a_folder_without_a_step_is_refused(tmp_path, capsys):
  assert cli.main(["replay", str(tmp_path)]) == 2
  assert "holds no step to replay: config.json, batch.npz, checkpoints is missing" in capsys.readouterr().err
