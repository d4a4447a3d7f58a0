"""What the array functions take: another shape or type is refused when it is traced, in words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vit_jax.ops import rope
from vit_jax.ops.attention import attention, self_attention
from vit_jax.ops.images import grey
from vit_jax.ops.normalize import layer_norm


def of(*shapes, dtype=jnp.float32):
  return [jnp.zeros(shape, dtype) for shape in shapes]


TOKENS = (2, 5, 3, 8)


@pytest.mark.parametrize(
  ("function", "arguments", "words"),
  [
    (attention, of(TOKENS, TOKENS, (2, 5, 3, 4)), "attention takes queries, keys and values [B, T, H, d] of one float"),
    (attention, of(TOKENS, TOKENS, (2, 4, 3, 8)), "attention takes queries"),
    (attention, [*of(TOKENS, TOKENS), *of(TOKENS, dtype=jnp.bfloat16)], "attention takes queries"),
    (self_attention, of((2, 5, 2, 3, 8)), "self_attention takes queries, keys and values as one array [B, T, 3, H, d]"),
    (rope.rotate, of(TOKENS, (6, 8), (6, 8)), "rotate takes tokens [B, T, H, d], got (2, 5, 3, 8), and tables [N, d]"),
    (rope.rotate, of(TOKENS, (4, 4), (4, 4)), "rotate takes tokens"),
    (rope.rotate, of(TOKENS, (4, 8), (3, 8)), "rotate takes tokens"),
    (grey, of((4, 4, 3)), "grey takes images [..., 3] of uint8 levels"),
    (grey, of((4, 4, 4), dtype=jnp.uint8), "grey takes images"),
  ],
)
def test_another_shape_or_type_is_refused_in_words(function, arguments, words):
  with pytest.raises(ValueError) as eager:
    function(*arguments)
  assert words in str(eager.value)
  with pytest.raises(ValueError) as traced:
    jax.jit(lambda *x: function(*x)).lower(*arguments)
  assert words in str(traced.value)


@pytest.mark.parametrize("shapes", [((8,), (1,)), ((1,), (8,)), ((2, 8), (8,))])
def test_scale_and_bias_are_of_the_last_axis(shapes):
  x, scale, bias = of((2, 5, 8), *shapes)
  with pytest.raises(ValueError, match=r"takes tokens \[..., D\], got \(2, 5, 8\), with scale and bias \[D\]"):
    layer_norm(x, scale, bias, 1e-6, jnp.float32)
  with pytest.raises(ValueError, match="layer_norm takes tokens"):
    jax.grad(lambda x: layer_norm(x, scale, bias, 1e-6, jnp.float32).sum())(x)
