"""What a dry run says of the time and the memory of a run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import pytest

from vit_jax import cli
from vit_jax import config as configs
from vit_jax.inspect.plan import state_bytes
from vit_jax.train import estimates, loop, setup
from vit_jax.train.estimates import Needs, span

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.py")
FLAGS = ["--config.batch_size=16", "--config.loss_group_size=2"]


def tiny(*overrides: str) -> setup.Run:
  config = configs.load(TINY, ["batch_size=16", "loss_group_size=16", "data.workers=0", *overrides])
  run = setup.prepare(configs.load(TINY, ["batch_size=16", "loss_group_size=2"]))
  one = setup.fit(config, len(run.source), jax.devices()[:1])
  return dataclasses.replace(one, source=run.source)


@pytest.fixture(scope="module")
def needs():
  """(run, estimated, measured)."""
  run = tiny()
  return run, estimates.estimate(run), estimates.measure(run)


def test_the_memory_that_is_estimated_is_near_the_compilers(needs):
  run, estimated, measured = needs
  state = state_bytes(loop.abstract_state(run), loop.abstract_batch(run, run.views))
  for found in (estimated, measured):
    assert {name: found.memory[name] for name in state} == state
  ratio = sum(estimated.memory.values()) / sum(measured.memory.values())
  assert 0.4 < ratio < 2.0, ratio  # of a tiny model; 0.8 to 0.9 of the models of the run files


def test_a_measured_step_was_made_and_compiled(needs):
  _, estimated, measured = needs
  assert measured.step > 0 and measured.compiling > 0 and "measured: " in measured.how
  assert estimated.step > 0 and estimated.compiling is None and "a forward pass reached just now" in estimated.how


def test_recomputation_and_micro_batches_lower_what_is_kept():
  plain, blocks, micro = (
    estimates._kept(run.method.modules(run.config).backbone, run.views, 16 // run.config.micro_batches)
    for run in (tiny(), tiny("model.remat=blocks"), tiny("micro_batches=2", "loss_group_size=8"))
  )
  assert blocks < plain and micro == pytest.approx(plain / 2, rel=0.05)


def test_a_long_run_is_said_to_be_long(needs):
  run = needs[0]
  run = dataclasses.replace(run, config=run.config.copy_and_resolve_references())
  run.config.duration, run.config.evaluation.every = "100000 steps", "10000 steps"
  needs = Needs(7.8, {"parameters": 2**30}, 2**29, "somehow", "a little")
  text = estimates.report(needs, run)
  assert "about 9 days: 100,000 steps of 7.8 s; besides 11 evaluations, saving and compiling" in text
  assert "about 1 GiB of the machine's 0.5 GiB: parameters 1 GiB" in text and "MORE THAN THERE IS" in text
  assert "somehow" in text and "a little" in text
  text = estimates.report(needs, run, done=90_000)
  assert "about 22 hours: 10,000 steps (of 100,000) of 7.8 s; besides 1 evaluation," in text


@pytest.mark.parametrize(
  ("seconds", "words"),
  [
    (0.2, "a second"),
    (42, "42 s"),
    (89, "89 s"),
    (600, "10 minutes"),
    (86400 * 9, "9 days"),
    (3600 * 30, "30 hours"),
    (86400 * 400, "400 days"),
    (86400 * 365.25 * 12, "12 years"),
  ],
)
def test_times_for_people(seconds, words):
  assert span(seconds) == words


@pytest.mark.parametrize("measure", [False, True])
def test_a_dry_run_begins_with_what_is_changed_and_writes_nothing(measure, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  monkeypatch.chdir(tmp_path)
  flags = ["--dry_run", "--workdir=new", "--config.seed=3", *["--measure"] * measure]
  assert cli.main(["train", f"--config={TINY}", *FLAGS, *flags]) == 0
  out = capsys.readouterr().out
  parts = ["changed by the run file and the command line", "what that means for these data", "what this run needs",
           "images ", "Starting from scratch", "training step, per image"]  # fmt: skip
  assert sorted(out.index(part) for part in parts) == [out.index(part) for part in parts]
  changed = out[: out.index(parts[1])]
  assert re.search(r"^  seed +3 +default 0$", changed, re.M) and "koleo.topk" not in out
  assert re.search(r"^  optim.freeze_last_layer +'4 steps' +given as '1 epochs'$", out, re.M)
  assert ("measured: " in out) == measure and ("estimated: " in out) != measure
  assert max(map(len, out.splitlines())) <= 80 or "environment" in out
  assert list(tmp_path.iterdir()) == []


def test_measuring_belongs_to_a_dry_run(tmp_path, capsys):
  assert cli.main(["train", f"--config={TINY}", f"--workdir={tmp_path}/new", "--measure"]) == 2
  assert "--measure: belongs to --dry_run" in capsys.readouterr().err
