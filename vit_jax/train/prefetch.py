"""Batches on the device before they are needed."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from typing import Any

import jax

from vit_jax.parallel import LocalBatch

Prefetched = tuple[dict[str, jax.Array], dict[str, Any]]


def prefetch(pipeline: Any, local: LocalBatch, *, size: int) -> Iterator[Prefetched]:
  """Yields (batch as global arrays, the pipeline's state after that batch), `size` batches ahead.

  The state that belongs to a batch travels with it: what is saved with a step must not run ahead of the step.

  Args:
    pipeline: an iterator of dicts of this process's rows, with `get_state()`.
    local: where these rows are in the batch.
    size: batches kept on the device beyond the one in use.
  """
  queue: collections.deque = collections.deque()
  rows = iter(pipeline)
  # The first batch is given out at once: while the step is compiled for it, the pipeline makes the next ones. Then two
  # are taken for one that is given, until there are enough.
  for taken in itertools.chain([1], itertools.repeat(2)):
    for arrays in itertools.islice(rows, min(taken, size + 1 - len(queue))):
      batch = {name: local.whole(array) for name, array in arrays.items()}
      queue.append((batch, pipeline.get_state()))
    if not queue:
      return
    yield queue.popleft()
