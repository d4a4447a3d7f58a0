"""The compiled training step for every variant of the views, made ahead.

The step of a run with several resolutions is a program for each. The one that is needed first is compiled while
everything waits; a thread then compiles the others, in the order in which they will be needed, while the first trains.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

from vit_jax.data.views.base import Views

log = logging.getLogger(__name__)

Batch = Mapping[str, Any]  # of arrays, or of jax.ShapeDtypeStruct with shardings


# Fusions of the library YNNPACK: those around a reduction, attention's for one, but no single matrix products, in which
# Eigen is the faster: on one CPU core (AMD EPYC) 96 to 110 against 86 to 99 GFLOP/s at the sizes of ViT-S/16.
_OPTIONS = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}}


@functools.cache
def compiler_options(platform: str) -> dict[str, str]:
  """Options of the compiler that make steps faster on a platform; none where this version does not know them.

  What XLA_FLAGS says of one goes first.
  """
  options = {
    name: value for name, value in _OPTIONS.get(platform, {}).items() if name not in os.environ.get("XLA_FLAGS", "")
  }
  if options:
    try:
      jax.jit(lambda x: x).lower(0.0).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      log.info("This version of XLA does not know what makes steps faster: %s", str(error).splitlines()[0])
      return {}
  return options


class _Compiled(NamedTuple):
  call: Callable[[Any, Batch], Any]
  seconds: float


class CompiledSteps:
  """Compiles the steps (state, batch) -> (state, metrics) of several variants of the views.

      with CompiledSteps(make_step, abstract_state, {views_a: batch_a, views_b: batch_b}, context) as steps:
        if not steps.ready(views_a):
          steps.wait(views_a)
        state, metrics = steps(views_a, state, batch)

  Args:
    make: the jitted step of a variant.
    state: its first argument: shapes, types and shardings.
    batches: shapes, types and shardings of the batches of each variant, in the order in which they will come.
    context: makes the context in which a step is traced; entered in each thread that compiles.
  """

  def __init__(
    self,
    make: Callable[[Views], Any],
    state: Any,
    batches: Mapping[Views, Batch],
    context: Callable[[], AbstractContextManager],
  ):
    self._make, self._state, self._context = make, state, context
    self._batches = dict(batches)
    self._compiled: dict[Views, _Compiled] = {}
    self._pending: dict[Views, Future[_Compiled]] = {}
    self._news: list[tuple[Views, float]] = []
    self._thread: ThreadPoolExecutor | None = None

  def ready(self, views: Views) -> bool:
    """Whether the step of this variant can run at once.

    Raises:
      Exception: what went wrong while any step was compiled in the background: better now than when it is needed.
    """
    for other in [other for other, future in self._pending.items() if future.done()]:
      self._keep(other, self._pending.pop(other).result())
    return views in self._compiled

  def wait(self, views: Views) -> None:
    """Makes the step of this variant ready; the first call compiles it here and begins with the others."""
    if views in self._pending:
      self._keep(views, self._pending.pop(views).result())
    elif views not in self._compiled:
      self._keep(views, self._compile(views))
    if self._thread is None:
      self._thread = ThreadPoolExecutor(1, "compile")
      for other in self._batches:
        if other not in self._compiled:
          self._pending[other] = self._thread.submit(self._compile, other)

  def __call__(self, views: Views, state: Any, batch: Batch) -> Any:
    """The step; an array that is not on the devices yet is an error: the step would wait for the host."""
    with jax.transfer_guard("disallow"):
      return self._compiled[views].call(state, batch)

  def news(self) -> Iterator[tuple[Views, float]]:
    """(variant, seconds) of every compilation that has ended since this was asked last."""
    while self._news:
      yield self._news.pop(0)

  def close(self, *, wait: bool = True) -> None:
    """Drops what is not yet begun and waits for what is: a compilation cannot be stopped, but left behind."""
    if self._thread is not None:
      self._thread.shutdown(wait=False, cancel_futures=True)
      if not wait:
        return
      if any(future.running() for future in self._pending.values()):
        log.info("Waiting for a compilation to end.")
      self._thread.shutdown()

  def __enter__(self) -> CompiledSteps:
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
    self.close(wait=kind is None or issubclass(kind, Exception))  # not if somebody wants to stop

  def _keep(self, views: Views, compiled: _Compiled) -> None:
    self._compiled[views] = compiled
    self._news.append((views, compiled.seconds))

  def _compile(self, views: Views) -> _Compiled:
    start = time.perf_counter()
    with self._context():
      compiled = self._make(views).lower(self._state, self._batches[views]).compile()
    return _Compiled(compiled, time.perf_counter() - start)
