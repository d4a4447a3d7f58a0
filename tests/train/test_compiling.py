"""Steps compiled ahead for several variants of the views, one at once and the others in a thread."""

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
from vit_jax.train.compiling import CompiledSteps, compiler_options
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


def abstract(batch):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)


def steps(mesh, traced, *widths, context=mesh_context):
  replicated = NamedSharding(mesh, PartitionSpec())
  state = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
  batches = {width: abstract(batch_of(mesh, width)) for width in widths}  # widths in place of views
  make = lambda width: jax.jit(traced, donate_argnums=0, out_shardings=(replicated, None))  # noqa: E731
  return CompiledSteps(make, state, batches, lambda: context(mesh)), jax.device_put(jnp.float32(0), replicated)


def until(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_the_first_is_compiled_here_the_others_in_a_thread_all_under_the_mesh(mesh):
  traced = Traced()
  compiled, state = steps(mesh, traced, 3, 5, 8)
  with compiled:
    assert not compiled.ready(3) and not traced.seen
    compiled.wait(3)
    assert traced.seen[3] == (threading.current_thread(), True)
    until(lambda: compiled.ready(8))
    for width in (5, 8):
      thread, under_mesh = traced.seen[width]
      assert thread is not threading.current_thread() and under_mesh
    assert [width for width, seconds in compiled.news() if seconds > 0] == [3, 5, 8]
    assert not list(compiled.news())
    total = 0.0
    for width in (5, 3, 8, 5):
      batch = batch_of(mesh, width)
      before = state
      state, metrics = compiled(width, state, batch)
      total += float(batch["x"].sum())
      assert float(metrics["mean"]) == float(batch["x"].mean())
      assert before.is_deleted()  # donated
    assert float(state) == total
  assert list(traced.seen) == [3, 5, 8]  # each once, in the order given


def test_a_step_that_is_traced_twice_is_a_mistake(mesh, monkeypatch):
  """Each trace is followed by minutes of compiling: it would stand still in the middle of a run, unnoticed."""

  def make_step(run, views):
    def training_step(state, batch):
      return state + batch["x"].sum(), {}

    return training_step

  monkeypatch.setattr(loop, "make_step", make_step)
  state = jax.device_put(jnp.float32(0), NamedSharding(mesh, PartitionSpec()))
  run = types.SimpleNamespace(mesh=mesh)
  for width in (3, 5, 3):  # a step of its own each: what an earlier one has traced does not count
    step = loop.jitted_step(run, state, width)
    for _ in range(2):
      step.lower(state, abstract(batch_of(mesh, width)))
  with pytest.raises(AssertionError, match=r"Function 'training_step' is traced > 1 times"):
    step.lower(state, abstract(batch_of(mesh, 4)))


def test_a_step_takes_nothing_from_the_host(mesh):
  compiled, state = steps(mesh, Traced(), 3)
  with compiled:
    compiled.wait(3)
    compiled(3, state, batch_of(mesh, 3))
    host = {name: np.asarray(array) for name, array in batch_of(mesh, 3).items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
      compiled(3, jax.device_put(jnp.float32(0), NamedSharding(mesh, PartitionSpec())), host)


def test_what_fails_in_the_thread_is_raised_before_it_is_needed(mesh):
  def fail(width):
    if width == 5:
      raise ValueError("no room for 5")

  compiled, _ = steps(mesh, Traced(fail), 3, 5)
  with compiled:
    compiled.wait(3)
    with pytest.raises(ValueError, match="no room for 5"):
      until(lambda: not compiled.ready(3))


def test_closing_waits_for_the_running_compilation_and_drops_the_rest(mesh):
  running, go_on = threading.Event(), threading.Event()

  def block(width):
    if width == 5:
      running.set()
      assert go_on.wait(60)

  traced = Traced(block)
  compiled, _ = steps(mesh, traced, 3, 5, 8)
  compiled.wait(3)
  assert running.wait(60)
  closing = threading.Thread(target=compiled.close)
  closing.start()
  closing.join(0.2)
  assert closing.is_alive()
  go_on.set()
  closing.join(60)
  assert not closing.is_alive() and list(traced.seen) == [3, 5]


def test_without_further_shapes_no_thread_works(mesh):
  compiled, state = steps(mesh, Traced(), 3, context=lambda mesh: contextlib.nullcontext())
  before = threading.active_count()
  with compiled:
    compiled.wait(3)
    compiled(3, state, batch_of(mesh, 3))
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
