"""What the losses take: another shape or type is refused when it is traced, in words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vit_jax import losses
from vit_jax.losses.assignment import balanced
from vit_jax.losses.prototypes import cross_entropies

F32, BF16, INT = jnp.float32, jnp.bfloat16, jnp.int32


def of(*shapes, dtype=F32):
  return [jnp.zeros(shape, dtype) for shape in shapes]


@pytest.mark.parametrize(
  ("loss", "arguments", "words"),
  [
    (losses.dino, of((4, 8), (2, 4, 8)), "rank 2 (shape (4, 8)) but expected 3. [dino takes student_logits [S, B, K]"),
    (losses.dino, of((2, 4, 8), (2, 4, 1)), "dino takes student_logits"),  # would be spread over the prototypes
    (losses.dino, of((2, 1, 8), (2, 4, 8)), "dino takes student_logits"),
    (losses.dino, of((2, 4, 8), (2, 4, 8), dtype=INT), "type int32 but expected <class 'float'>. [dino takes"),
    (losses.koleo, of((2, 4, 8)), "koleo takes the features [B, D], floats, of one group"),
    (losses.koleo, of((4, 8), dtype=INT), "koleo takes the features"),
    (losses.gram, of((2, 4, 8), (4, 8)), "gram takes patch features [B, N, D]"),
    (losses.gram, of((2, 4, 8), (1, 4, 8)), "gram takes patch features [B, N, D]"),
    (losses.gram, of((8,), (8,)), "gram takes patch features [B, N, D]"),
    (losses.sinkhorn_knopp, [*of((2, 4, 8)), 0.1], "sinkhorn_knopp takes logits [N, K]"),
    (losses.softmax_center, [*of((4, 8), (1, 8)), 0.1], "softmax_center takes logits [N, K] and a center [K]"),
  ],
)
def test_another_shape_or_type_is_refused_in_words(loss, arguments, words):
  with pytest.raises(ValueError) as eager:
    loss(*arguments)
  assert words in str(eager.value)
  with pytest.raises(ValueError) as traced:
    jax.jit(lambda *x: loss(*x)).lower(*arguments)
  assert words in str(traced.value)


@pytest.mark.parametrize("weights", [(4, 1), (1,), ()])
def test_weights_of_ibot_are_one_for_each_patch(weights):
  with pytest.raises(ValueError, match=r"ibot takes student_logits and teacher_probs \[M, K\] with weights \[M\]"):
    losses.ibot(*of((4, 8), (4, 8), weights), num_crops=2)


def test_sinkhorn_needs_an_iteration():
  with pytest.raises(ValueError, match="at least one iteration, got iterations=0"):
    losses.sinkhorn_knopp(jnp.zeros((4, 8)), 0.1, iterations=0)


def test_prototypes_are_of_the_bottleneck_and_the_targets():
  targets = balanced(jnp.zeros((6, 8)), 0.1).reshape(3, 2)
  for bottleneck, kernel, weights in (((3, 4, 5), (6, 8), (3, 4, 2)), ((3, 4, 5), (5, 8), (3, 4, 1))):
    with pytest.raises(ValueError, match=r"cross_entropies takes a bottleneck \[U, S, d\]"):
      cross_entropies(*of(bottleneck, kernel), targets, *of(weights))


def test_losses_of_half_precision_are_computed_in_float32():
  half = dict(dtype=BF16)
  values = [
    losses.dino(*of((2, 4, 8), (2, 4, 8), **half)),
    losses.ibot(*of((4, 8), (4, 8), (4,), **half), num_crops=2),
    losses.koleo(jnp.eye(4, dtype=BF16)),
    losses.gram(*of((2, 4, 8), (2, 4, 8), **half)),
    losses.sinkhorn_knopp(jnp.zeros((4, 8), BF16), 0.1),
    losses.softmax_center(*of((4, 8), (8,), **half), 0.1),
  ]
  assert {value.dtype for value in values} == {jnp.dtype(F32)}
