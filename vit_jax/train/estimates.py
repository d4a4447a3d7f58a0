"""How long a run takes on this machine and what memory it needs: estimated in seconds, or measured in a few steps.

The estimate compiles no training step. Its time is the FLOPs of the steps (`inspect.cost`) over the rate that a forward
pass of the backbone reaches here and now; its memory is the state, exactly, and what the backward pass keeps of the
forward pass, which tracing shows. Measuring compiles the step, asks the compiler what it takes, and makes a few.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax import methods, parallel
from vit_jax.config import UserError
from vit_jax.inspect import cost
from vit_jax.inspect.columns import align
from vit_jax.inspect.plan import state_bytes
from vit_jax.inspect.tables import flops
from vit_jax.train import planning, setup
from vit_jax.train.loop import abstract_batch, abstract_state
from vit_jax.train.prefetch import prefetch
from vit_jax.train.profiling import Steps

_DEPTH = 2  # blocks of a ViT whose rate is that of all
_CROPS = {"cpu": (8, 2e11)}  # in the forward pass that is timed: at most so many, and FLOPs; on others _MOST
_MOST = (64, 2e13)
_TRIED = (4, 5.0)  # times that it is made, or seconds
_SECONDS = 20.0  # for steps that are measured, about
_STEPS = (2, 10)  # of these at least and at most
_GIB = 2**30


@dataclass(frozen=True)
class Needs:
  """What a run needs of this machine.

  Attributes:
    step: seconds from step to step; None: it could not be tried, see `how`.
    memory: bytes of each device, by what they are for.
    capacity: bytes that there are; None: not known.
    how: what was done to know, for people.
    error: how far it may be off, for people.
    compiling: seconds; None: nothing was compiled.
  """

  step: float | None
  memory: dict[str, int]
  capacity: int | None
  how: str
  error: str
  compiling: float | None = None


def estimate(run: setup.Run) -> Needs:
  """By FLOPs over the rate of a forward pass that is timed now, and by tracing the backward pass."""
  variants, shares = run.views.variants(), run.views.shares
  work = sum(share * planning.model_flops(run.config, v) for v, share in zip(variants, shares, strict=True))
  work *= run.config.batch_size / sum(shares)
  largest = max(variants, key=lambda views: tuple(views.sizes.values()))
  memory = state_bytes(abstract_state(run), abstract_batch(run, largest))
  backbones = [run.method.modules(alone).backbone for alone in methods.each_student(run.config).values()]
  images = run.config.batch_size // parallel.batch_shards(run.mesh) // run.config.micro_batches
  memory["activations"] = max(_kept(one, largest, images) for one in backbones)
  memory["gradients"] = memory["parameters"]
  error = "rough: it may take three times as long, and a fifth more memory; --measure makes a few steps to know better"
  try:
    rate = _rate(max(backbones, key=lambda one: one.width), largest.global_size, images)
  except jax.errors.JaxRuntimeError as problem:
    how = f"no time could be estimated: {str(problem).splitlines()[0]}"
    return Needs(None, memory, capacity(), how, error)
  several = _independent_devices(run)
  how = f"estimated: {flops(work)} a step at {flops(rate * several)}/s, which a forward pass reached just now"
  return Needs(work / rate / several, memory, capacity(), how, error)


def measure(run: setup.Run) -> Needs:
  """By compiling the training step and making a few with the run's own data.

  Raises:
    UserError: if they do not fit into the memory.
  """
  try:
    return _measured(run)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise UserError(
      f"--measure: a step needs more memory than there is ({str(error).splitlines()[0]}): lower batch_size, raise "
      "micro_batches, or set model.remat=blocks"
    ) from error


def _measured(run: setup.Run) -> Needs:
  local = parallel.LocalBatch(parallel.batch_sharding(run.mesh))
  with setup.open_pipeline(run, local) as pipeline:
    batches = prefetch(pipeline, local, size=run.config.data.prefetch)
    with contextlib.closing(batches):
      steps, began = Steps(run, batches), time.perf_counter()
      first, _ = steps.make(1)
      compiling = time.perf_counter() - began - first
      least, most = _STEPS
      number = min(max(int(_SECONDS / first), least), most)
      step, waiting = steps.make(number)
      memory = max((one.memory_analysis() for one in steps.compiled.values()), key=lambda m: m.temp_size_in_bytes)
  state = state_bytes(abstract_state(run), abstract_batch(run, run.views.variants()[0]))
  whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  state["temporaries"] = memory.temp_size_in_bytes + max(whole - sum(state.values()), 0)
  several = f" of the resolutions that came in them ({len(steps.compiled)})" if len(run.views.variants()) > 1 else ""
  how = f"measured: {number} steps{several} with the run's data, {1e3 * waiting:.3g} ms of each waiting for them"
  return Needs(step, state, capacity(), how, "the compiler's own figure of the memory", compiling)


def report(needs: Needs, run: setup.Run, *, done: int = 0, width: int | None = None) -> str:
  """A few lines for people: the time of the run, and the memory."""
  total, rows = run.steps("duration"), []
  if needs.step is not None:
    left = f"{total - done:,} steps" + (f" (of {total:,})" if done else "")
    besides = ["saving"]
    if every := run.steps("evaluation.every"):
      number = math.ceil((total - done) / every) + (not done)  # the first is at step 0
      besides.insert(0, f"{number} evaluation{'' if number == 1 else 's'}")
    besides.append("compiling" if needs.compiling is None else f"{needs.compiling:.0f} s of compiling")
    each = f"{_digits(needs.step)} s" if needs.step >= 1 else f"{1e3 * needs.step:.3g} ms"
    rows.append(("  time", f"about {span((total - done) * needs.step)}: {left} of {each}; besides {_listed(besides)}"))
  each = sum(needs.memory.values())
  parts = ", ".join(f"{name} {_size(value)}" for name, value in needs.memory.items() if value)
  rows.append(("  memory", f"about {_size(each)} {_of_what(run, needs.capacity)}: {parts}"))
  if needs.capacity is not None and each * _sharing(run) > needs.capacity:
    rows.append(("", "MORE THAN THERE IS: lower batch_size, raise micro_batches, or set model.remat=blocks"))
  rows += [("  known by", needs.how), ("", needs.error)]
  return f"what this run needs on this machine\n{align(rows, keep=(0,), width=width)}"


def _listed(parts: list[str]) -> str:
  return f"{', '.join(parts[:-1])} and {parts[-1]}"


def span(seconds: float) -> str:
  """A time for people: "40 s", "12 minutes", "3.5 hours", "9.1 days"."""
  for unit, name in ((86400 * 365.25, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
    if seconds >= 1.5 * unit:
      return f"{seconds / unit:.2g} {name}" if seconds < 100 * unit else f"{seconds / unit:,.0f} {name}"
  return "a second" if seconds < 1 else f"{seconds:.0f} s"


def capacity() -> int | None:
  """Bytes of one of this process's devices: of its memory, of a CPU the machine's; None: not known."""
  device = jax.local_devices()[0]
  if device.platform != "cpu":
    return (device.memory_stats() or {}).get("bytes_limit")
  try:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (ValueError, OSError):
    return None


def _rate(model: Any, size: int, images: int) -> float:
  """FLOP/s of the forward pass of a backbone on one device; of a ViT, a few blocks stand for all."""
  if hasattr(model, "depth"):
    model = model.clone(depth=min(model.depth, _DEPTH))
  each = cost.count(model, size).flops
  most, work = _CROPS.get(jax.default_backend(), _MOST)
  crops = max(min(most, 2 * images, int(work / each)), 1)
  shapes = cost.abstract_params(model)
  params = jax.tree.map(lambda x: jnp.full(x.shape, 0.02, x.dtype), shapes)
  batch = jnp.zeros((crops, size, size, model.in_channels))
  forward = jax.jit(lambda params, x: model.apply({"params": params}, x).cls).lower(params, batch).compile()
  taken = []
  times, enough = _TRIED
  while len(taken) < times and sum(taken) < enough:  # the first warms up
    start = time.perf_counter()
    jax.block_until_ready(forward(params, batch))
    taken.append(time.perf_counter() - start)
  return crops * each / min(taken)


def _kept(model: Any, views: Any, images: int) -> int:
  """Bytes that the backward pass of a backbone keeps of the forward pass of so many images' crops."""
  params = cost.abstract_params(model)

  def kept(size: int, crops: int) -> int:
    batch = jax.ShapeDtypeStruct((crops, size, size, model.in_channels), jnp.float32)

    def residuals(params: Any, batch: Any) -> Any:
      def outputs(params: Any) -> Any:
        features = model.apply({"params": params}, batch)
        return features.cls, features.patches

      return jax.vjp(outputs, params)[1]

    found = jax.tree.leaves(jax.eval_shape(residuals, params, batch))
    own = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))  # they are among what is kept
    return max(sum(leaf.size * leaf.dtype.itemsize for leaf in found) - own, 0)

  part = kept(views.local_size, views.local_number * images) if views.local_number else 0
  return kept(views.global_size, 2 * images) + part


def _independent_devices(run: setup.Run) -> int:
  """Devices that compute side by side: those of a CPU share its cores."""
  return jax.process_count() if jax.default_backend() == "cpu" else run.mesh.size


def _sharing(run: setup.Run) -> int:
  """Devices of the mesh whose memory is one: those of a CPU."""
  return run.mesh.size // jax.process_count() if jax.default_backend() == "cpu" else 1


def _of_what(run: setup.Run, there: int | None) -> str:
  if there is None:
    return "on each device"
  sharing = _sharing(run)
  if jax.default_backend() != "cpu":
    return f"of the {_size(there)} of each device"
  return f"of the machine's {_size(there)}" + (f", {sharing} times" if sharing > 1 else "")


def _size(value: int) -> str:
  return f"{_digits(value / _GIB)} GiB" if value >= _GIB / 10 else f"{_digits(value / 2**20)} MiB"


def _digits(value: float) -> str:
  return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
