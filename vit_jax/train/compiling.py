"""The compiled training step for every shape of batch, made ahead.

The step of a run with several resolutions is a program for each. The one that is needed first is compiled while
everything waits; a thread then compiles the others, in the order in which they will be needed, while the first trains.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

log = logging.getLogger(__name__)

Batch = Mapping[str, Any]  # of arrays, or of jax.ShapeDtypeStruct with shardings
Signature = tuple[tuple[str, tuple[int, ...]], ...]


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
  """Compiles a jitted step (state, batch) -> (state, metrics) for batches of several shapes.

      with CompiledSteps(jitted, abstract_state, [("512/112", batch_a), ("768/112", batch_b)], context) as steps:
        if not steps.ready(batch):
          steps.wait(batch)
        state, metrics = steps(state, batch)

  Args:
    step: the jitted function.
    state: its first argument: shapes, types and shardings.
    batches: (name, shapes, types and shardings) of the batches to expect, in the order in which they will come.
    context: makes the context in which the step is traced; entered in each thread that compiles.
  """

  def __init__(
    self,
    step: Any,
    state: Any,
    batches: Iterable[tuple[str, Batch]],
    context: Callable[[], AbstractContextManager],
  ):
    self._step, self._state, self._context = step, state, context
    self._expected = {signature(batch): (name, batch) for name, batch in batches}
    self._compiled: dict[Signature, _Compiled] = {}
    self._pending: dict[Signature, Future[_Compiled]] = {}
    self._news: list[tuple[str, float]] = []
    self._thread: ThreadPoolExecutor | None = None

  def ready(self, batch: Batch) -> bool:
    """Whether the step for this batch can run at once.

    Raises:
      Exception: what went wrong while any step was compiled in the background: better now than when it is needed.
    """
    for key in [key for key, future in self._pending.items() if future.done()]:
      self._take(key)
    return signature(batch) in self._compiled

  def wait(self, batch: Batch) -> None:
    """Makes the step for this batch ready; the first call compiles it here and begins with the others."""
    key = signature(batch)
    if key in self._pending:
      self._take(key)
    elif key not in self._compiled:
      self._keep(key, self._compile(batch))
    if self._thread is None:
      self._thread = ThreadPoolExecutor(1, "compile")
      for other, (_, shapes) in self._expected.items():
        if other not in self._compiled:
          self._pending[other] = self._thread.submit(self._compile, shapes)

  def __call__(self, state: Any, batch: Batch) -> Any:
    return self._compiled[signature(batch)].call(state, batch)

  def news(self) -> Iterator[tuple[str, float]]:
    """(name, seconds) of every compilation that has ended since this was asked last."""
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

  def _take(self, key: Signature) -> None:
    self._keep(key, self._pending.pop(key).result())

  def _keep(self, key: Signature, compiled: _Compiled) -> None:
    self._compiled[key] = compiled
    name = self._expected[key][0] if key in self._expected else ""
    self._news.append((name, compiled.seconds))

  def _compile(self, batch: Batch) -> _Compiled:
    start = time.perf_counter()
    with self._context():
      compiled = self._step.lower(self._state, abstract(batch)).compile()
    return _Compiled(compiled, time.perf_counter() - start)


def abstract(batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, types and shardings of a batch."""
  return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in batch.items()}


def signature(batch: Batch) -> Signature:
  """What tells the batches of one resolution from those of another."""
  return tuple(sorted((name, tuple(array.shape)) for name, array in batch.items()))
