"""Batches on the device before they are needed."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from vit_jax.parallel import LocalBatch


class Prefetched(NamedTuple):
  """A batch on its way to the step.

  Attributes:
    batch: global arrays.
    views: the variant that it is of.
    data_state: the pipeline's state after it: what is saved with a step must not run ahead of the step.
  """

  batch: dict[str, jax.Array]
  views: Any
  data_state: dict[str, Any]


def prefetch(pipeline: Any, local: LocalBatch, *, size: int) -> Iterator[Prefetched]:
  """Yields the batches of a pipeline, `size` of them ahead.

  Args:
    pipeline: an endless iterator of dicts of this process's rows, with `views` and `get_state()`.
    local: where these rows are in the batch.
    size: batches kept on the device beyond the one in use.
  """
  queue: collections.deque[Prefetched] = collections.deque()
  # The first batch is given out at once: while the step is compiled for it, the pipeline makes the next ones. Then two
  # are taken for one that is given, until there are enough.
  for taken in itertools.chain([1], itertools.repeat(2)):
    for _ in range(min(taken, size + 1 - len(queue))):
      views = pipeline.views
      arrays = next(pipeline, None)
      if arrays is None:
        break
      batch = {name: local.whole(array) for name, array in arrays.items()}
      queue.append(Prefetched(batch, views, pipeline.get_state()))
    if not queue:
      return
    yield queue.popleft()
