"""Batches on the device before they are needed."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding

Prefetched = tuple[dict[str, jax.Array], dict[str, Any]]


def prefetch(pipeline: Any, sharding: NamedSharding, *, size: int) -> Iterator[Prefetched]:
  """Yields (batch as global arrays, the pipeline's state after that batch), `size` batches ahead.

  The state that belongs to a batch travels with it: what is saved with a step must not run ahead of the step.

  Args:
    pipeline: an iterator of dicts of this process's rows, with `get_state()`.
    sharding: of the leading axis of every array.
    size: batches kept on the device beyond the one in use.
  """
  queue: collections.deque = collections.deque()
  for rows in pipeline:
    batch = {name: jax.make_array_from_process_local_data(sharding, array) for name, array in rows.items()}
    queue.append((batch, pipeline.get_state()))
    if len(queue) > size:
      yield queue.popleft()
