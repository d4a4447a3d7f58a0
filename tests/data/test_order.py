"""The order of the records: permutations, all alike, none like another."""

import numpy as np
import pytest

from vit_jax.data.order import shuffled


@pytest.mark.parametrize("records", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_every_record_comes_once_in_each_epoch(records):
  order = shuffled(np.arange(5 * records), records, seed=7).reshape(5, records)
  np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(records), (5, 1)))


def test_an_entry_does_not_depend_on_what_else_is_asked():
  whole = shuffled(np.arange(300), 100, seed=1)
  np.testing.assert_array_equal(shuffled(np.array([250, 3, 117]), 100, seed=1), whole[[250, 3, 117]])


def test_epochs_and_seeds_are_unrelated_orders():
  n = 1000
  orders = [*shuffled(np.arange(3 * n), n, seed=0).reshape(3, n), *shuffled(np.arange(2 * n), n, seed=1).reshape(2, n)]
  for i, a in enumerate(orders):
    for b in orders[:i]:
      assert (a == b).sum() < 8  # expected 1
      assert abs(np.corrcoef(a, b)[0, 1]) < 0.13  # four standard errors
    assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.13
    assert (np.diff(a) == 1).sum() < 8


@pytest.mark.parametrize("records", [3, 10, 33])
def test_each_record_is_as_likely_at_each_place(records):
  epochs = 20_000
  order = shuffled(np.arange(epochs * records), records, seed=5).reshape(epochs, records)
  counts = np.stack([np.bincount(order[:, place], minlength=records) for place in range(records)])
  expected = epochs / records
  freedom = (records - 1) ** 2
  assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_the_orders_of_three_records_are_equally_likely():
  order = shuffled(np.arange(60_000), 3, seed=2).reshape(-1, 3)
  _, counts = np.unique(order, axis=0, return_counts=True)
  assert len(counts) == 6
  assert ((counts - 20_000 / 6) ** 2 / (20_000 / 6)).sum() < 20.5  # chi-square, 5 degrees of freedom: p < 0.001


def test_a_billion_records_need_no_memory():
  order = shuffled(np.arange(10**9 - 1000, 10**9 + 1000), 10**9, seed=3)
  assert order.min() >= 0 and order.max() < 10**9
  assert len(np.unique(order)) == 2000
  assert abs(order.mean() / 10**9 - 0.5) < 0.03
