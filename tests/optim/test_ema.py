"""The average of the students."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import pytest

from vit_jax.optim import ema


def test_average_keeps_the_type_of_the_teacher():
  teacher, student = {"w": jnp.full((2, 3), 1.0)}, {"w": jnp.full((2, 3), 3.0, jnp.bfloat16)}
  chex.assert_trees_all_equal(ema.update(teacher, student, 0.75), {"w": jnp.full((2, 3), 1.5)})


@pytest.mark.parametrize("student", [{"w": jnp.zeros((1, 3))}, {"w": jnp.zeros(3)}, {"v": jnp.zeros((2, 3))}, {}])
def test_parameters_of_another_model_are_refused(student):
  """A row would be added to every row, without an error."""
  with pytest.raises(ValueError, match="a teacher is the average of students with the same parameters"):
    ema.update({"w": jnp.zeros((2, 3))}, student, 0.9)
