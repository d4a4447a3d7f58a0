"""Batches on the device ahead of the step, each with the state that belongs to it."""

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.train.prefetch import prefetch


class Numbers:
  """Batch i is [i], after which the state is i."""

  def __init__(self, count):
    self.made, self.count = 0, count

  @property
  def views(self):
    return f"views {self.made + 1}"

  def __next__(self):
    if self.made == self.count:
      raise StopIteration
    self.made += 1
    return {"number": np.array([self.made])}

  def get_state(self):
    return {"next_batch": self.made}


class One:
  """One process, one device."""

  def whole(self, rows):
    return jnp.asarray(rows)


@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_every_batch_comes_in_order_with_its_own_state(size):
  batches = prefetch(Numbers(7), One(), size=size)
  seen = [(int(batch["number"][0]), views, state["next_batch"]) for batch, views, state in batches]
  assert seen == [(i, f"views {i}", i) for i in range(1, 8)]


def test_the_first_batch_does_not_wait_for_others_and_no_more_than_asked_are_held():
  numbers = Numbers(50)
  batches = prefetch(numbers, One(), size=2)
  ahead = []
  for given in range(1, 7):
    next(batches)
    ahead.append(numbers.made - given)
  assert ahead == [0, 1, 2, 2, 2, 2]
