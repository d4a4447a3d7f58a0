"""Steps compiled ahead for batches of several shapes, one at once and the others in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax import parallel
from vit_jax.train import compiling, loop
from vit_jax.train.compiling import CompiledSteps, abstract, compiler_options, signature
from vit_jax.train.loop import mesh_context


@pytest.fixture
def mesh():
  return parallel.make_mesh({"replica": 1, "data": 2, "fsdp": 1, "tensor": 1}, jax.devices()[:2])


class Traced:
  """A step that notes where it is traced: {width of the batch: (thread, is there a mesh)}."""

  def __init__(self, hook=lambda width: None):
    self.seen, self.hook = {}, hook

  def __call__(self, state, batch):
    width = batch["x"].shape[1]
    self.seen[width] = (threading.current_thread(), not jax.sharding.get_abstract_mesh().empty)
    self.hook(width)
    return state + batch["x"].sum(), {"mean": batch["x"].mean()}


def batch_of(mesh, width):
  return {
    "x": jax.device_put(np.arange(4.0 * width, dtype=np.float32).reshape(4, width), parallel.batch_sharding(mesh))
  }


def steps(mesh, traced, *widths, context=mesh_context):
  replicated = NamedSharding(mesh, PartitionSpec())
  state = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
  batches = [(f"width {width}", abstract(batch_of(mesh, width))) for width in widths]
  jitted = jax.jit(traced, donate_argnums=0, out_shardings=(replicated, None))
  return CompiledSteps(jitted, state, batches, lambda: context(mesh)), jax.device_put(jnp.float32(0), replicated)


def until(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_the_first_is_compiled_here_the_others_in_a_thread_all_under_the_mesh(mesh):
  traced = Traced()
  compiled, state = steps(mesh, traced, 3, 5, 8)
  with compiled:
    assert not compiled.ready(batch_of(mesh, 3)) and not traced.seen
    compiled.wait(batch_of(mesh, 3))
    assert traced.seen[3] == (threading.current_thread(), True)
    until(lambda: compiled.ready(batch_of(mesh, 8)))
    for width in (5, 8):
      thread, under_mesh = traced.seen[width]
      assert thread is not threading.current_thread() and under_mesh
    assert [name for name, seconds in compiled.news() if seconds > 0] == ["width 3", "width 5", "width 8"]
    assert not list(compiled.news())
    total = 0.0
    for width in (5, 3, 8, 5):
      batch = batch_of(mesh, width)
      before = state
      state, metrics = compiled(state, batch)
      total += float(batch["x"].sum())
      assert float(metrics["mean"]) == float(batch["x"].mean())
      assert before.is_deleted()  # donated
    assert float(state) == total
  assert list(traced.seen) == [3, 5, 8]  # each once, in the order given


def test_a_batch_of_another_shape_is_compiled_when_it_comes(mesh):
  traced = Traced()
  compiled, state = steps(mesh, traced, 3)
  with compiled:
    compiled.wait(batch_of(mesh, 3))
    assert not compiled.ready(batch_of(mesh, 4))
    compiled.wait(batch_of(mesh, 4))
    state, _ = compiled(state, batch_of(mesh, 4))
    assert float(state) == float(batch_of(mesh, 4)["x"].sum())
    assert [name for name, _ in compiled.news()] == ["width 3", ""]


def test_a_step_that_is_traced_more_often_than_there_are_resolutions_is_a_mistake(mesh, monkeypatch):
  """Each trace is followed by minutes of compiling: it would stand still in the middle of a run, unnoticed."""

  def make_step(run):
    def training_step(state, batch):
      return state + batch["x"].sum(), {}

    return training_step

  monkeypatch.setattr(loop, "make_step", make_step)
  state = jax.device_put(jnp.float32(0), NamedSharding(mesh, PartitionSpec()))
  for widths in ((3,), (3, 5), (3,)):  # a run of its own each: what an earlier one has traced does not count
    run = types.SimpleNamespace(mesh=mesh, views=types.SimpleNamespace(variants=lambda widths=widths: widths))
    step = loop.jitted_step(run, state)
    for width in (*widths, *widths):
      step.lower(state, abstract(batch_of(mesh, width)))
  with pytest.raises(AssertionError, match=r"Function 'training_step' is traced > 1 times"):
    step.lower(state, abstract(batch_of(mesh, 4)))


def test_what_fails_in_the_thread_is_raised_before_it_is_needed(mesh):
  def fail(width):
    if width == 5:
      raise ValueError("no room for 5")

  compiled, _ = steps(mesh, Traced(fail), 3, 5)
  with compiled:
    compiled.wait(batch_of(mesh, 3))
    with pytest.raises(ValueError, match="no room for 5"):
      until(lambda: not compiled.ready(batch_of(mesh, 3)))


def test_closing_waits_for_the_running_compilation_and_drops_the_rest(mesh):
  running, go_on = threading.Event(), threading.Event()

  def block(width):
    if width == 5:
      running.set()
      assert go_on.wait(60)

  traced = Traced(block)
  compiled, _ = steps(mesh, traced, 3, 5, 8)
  compiled.wait(batch_of(mesh, 3))
  assert running.wait(60)
  closing = threading.Thread(target=compiled.close)
  closing.start()
  closing.join(0.2)
  assert closing.is_alive()
  go_on.set()
  closing.join(60)
  assert not closing.is_alive() and list(traced.seen) == [3, 5]


def test_signatures_tell_resolutions_apart_and_nothing_else():
  a = {"x": np.zeros((2, 3)), "y": np.zeros(4)}
  assert signature(a) == signature({"y": np.ones(4), "x": np.ones((2, 3))})
  assert signature(a) != signature({**a, "y": np.zeros(5)})
  assert signature(a) != signature({**a, "z": np.zeros(1)})


def test_without_further_shapes_no_thread_works(mesh):
  compiled, state = steps(mesh, Traced(), context=lambda mesh: contextlib.nullcontext())
  before = threading.active_count()
  with compiled:
    compiled.wait(batch_of(mesh, 3))
    compiled(state, batch_of(mesh, 3))
    assert threading.active_count() == before


@pytest.fixture
def fresh_options(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  compiler_options.cache_clear()
  yield
  compiler_options.cache_clear()


def test_options_are_those_that_the_compiler_of_the_platform_takes(fresh_options):
  options = compiler_options("cpu")
  assert options
  jax.jit(jnp.sin).lower(0.0).compile(compiler_options=options)
  assert compiler_options("tpu") == {}


def test_options_that_this_version_lacks_are_left_out(fresh_options, monkeypatch):
  monkeypatch.setattr(compiling, "_OPTIONS", {"cpu": {"xla_cpu_of_another_version": True}})
  assert compiler_options("cpu") == {}


def test_flags_of_the_environment_go_before_options(fresh_options, monkeypatch):
  (name,) = compiler_options("cpu")
  compiler_options.cache_clear()
  monkeypatch.setenv("XLA_FLAGS", f"--{name}=")
  assert compiler_options("cpu") == {}
