"""The host never waits for the step it has just started: what it reads is a step old, and asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from tests.train.test_loop import tiny
from vit_jax.train.compiling import CompiledSteps
from vit_jax.train.loop import train

EVERY, TOTAL = 4, 10


class Reads:
  """Which values the host read from the device, after how many steps were started.

  The transfer guard of JAX sees them on accelerators; on CPU arrays are in the memory of the host and nothing is
  transferred, but a read waits all the same.

  Attributes:
    implicit: after how many steps each value was read without `jax.device_get`.
    newest: after how many steps each value of the step that had just been started was read.
    asked: after how many steps `jax.device_get` was called for more than one value, as the log does.
  """

  def __init__(self, monkeypatch):
    self.implicit, self.newest, self.asked = [], [], []
    self._steps, self._explicit, self._outputs = 0, 0, ()
    value, device_get, call = ArrayImpl._value.fget, jax.device_get, CompiledSteps.__call__

    def seen(array):
      if self._steps and isinstance(array, ArrayImpl):
        if not self._explicit:
          self.implicit.append(self._steps)
        if any(array is output for output in self._outputs):
          self.newest.append(self._steps)

    def read(array):
      seen(array)
      return value(array)

    def shared(convert):  # these look into the memory of the host without asking the array
      def converted(array, *args, **options):
        seen(array)
        return convert(array, *args, **options)

      return converted

    def get(tree):
      self._explicit += 1
      if self._steps and len(jax.tree.leaves(tree)) > 1:
        self.asked.append(self._steps)
      try:
        return device_get(tree)
      finally:
        self._explicit -= 1

    def step(steps, views, state, batch):
      out = call(steps, views, state, batch)
      self._steps, self._outputs = self._steps + 1, jax.tree.leaves(out)
      return out

    monkeypatch.setattr(ArrayImpl, "_value", property(read))
    monkeypatch.setattr(np, "asarray", shared(np.asarray))
    monkeypatch.setattr(np, "array", shared(np.array))
    monkeypatch.setattr(jax, "device_get", get)
    monkeypatch.setattr(CompiledSteps, "__call__", step)


def test_a_read_that_waits_would_be_seen(monkeypatch):
  monkeypatch.setattr(CompiledSteps, "__call__", lambda steps, views, state, batch: jnp.zeros(2) + batch)
  found = Reads(monkeypatch)
  out = CompiledSteps.__call__(None, None, None, 1.0)
  jax.device_get(out)
  assert found.newest == [1] and not found.implicit
  for wait in (lambda x: float(x[0]), lambda x: np.asarray(x), lambda x: bool(jnp.any(x > 0))):
    found.implicit.clear()
    wait(jnp.sin(out))
    assert set(found.implicit) == {1}


@pytest.fixture
def reads(monkeypatch, tmp_path):
  """Those of a run that logs every few steps."""
  overrides = {"log.every": EVERY, "duration": f"{TOTAL} steps", "checkpoint.every": f"{TOTAL} steps"}
  one_device = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: one_device)
  config = tiny(**overrides, **{"evaluation.every": "0 steps", "data.workers": 0})
  found = Reads(monkeypatch)
  with jax.transfer_guard_device_to_host("disallow"):
    train(config, str(tmp_path))
  return found


def test_the_loop_reads_nothing_of_a_step_in_flight_and_nothing_without_asking(reads):
  before_the_end = [step for step in reads.newest if step < TOTAL]
  assert reads.newest and not before_the_end  # at the end it waits for the last step, and saves it
  assert not [step for step in reads.implicit if step < TOTAL]
  assert [step for step in reads.asked if step < TOTAL] == [2, EVERY + 1, 2 * EVERY + 1]  # the log, one step late
