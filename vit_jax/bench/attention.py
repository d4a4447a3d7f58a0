"""`vit-jax bench attention`: ours, forward and forward with backward, beside JAX's own and PyTorch's.

Token counts are those of the recipes: a global crop of 112 px has 54, of 224 px 201, of 512 px 1029, with class token
and four registers. Queries, keys and values are one array, as the linear map before leaves them. Each repetition is
several calls, so that asking PyTorch's process costs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.bench.harness import Part, Row, alternate
from vit_jax.bench.peer import PEER_PYTHON, find_peer
from vit_jax.ops.attention import self_attention

_TOKENS = 16 * 201  # of a repetition's call, about, whatever the length


@dataclasses.dataclass(frozen=True)
class Case:
  """One shape [batch, tokens, heads, head_dim] in one type; `calls` of it are a repetition."""

  tokens: int
  batch: int
  heads: int = 6
  head_dim: int = 64
  dtype: str = "float32"
  calls: int = 4

  def arrays(self) -> list[jax.Array]:
    """Queries, keys and values [batch, tokens, 3, heads, head_dim], and a gradient of the result."""
    rng = np.random.default_rng(0)
    ends = (self.heads, self.head_dim)
    shapes = ((self.batch, self.tokens, 3, *ends), (self.batch, self.tokens, *ends))
    return [jnp.asarray(rng.standard_normal(shape, np.float32), self.dtype) for shape in shapes]


def cases() -> tuple[Case, ...]:
  """Of this backend: small ones in float32 on a CPU, 16 times as many rows in bfloat16 elsewhere."""
  on_cpu = jax.default_backend() == "cpu"
  more, dtype = (1, "float32") if on_cpu else (16, "bfloat16")
  return tuple(Case(tokens, max(_TOKENS // tokens, 1) * more, dtype=dtype) for tokens in (54, 201, 1029))


def parts() -> list[Part]:
  """Each length, forward and with the backward pass: two rows, beside JAX and beside PyTorch."""
  return [
    Part(
      f"{case.tokens}{'-gradients' if backward else ''}",
      f"{case.tokens} tokens{', with gradients' if backward else ''}",
      functools.partial(compare, case, backward),
    )
    for case in cases()
    for backward in (False, True)
  ]


def compare(case: Case, backward: bool, seconds: float) -> Iterator[Row]:
  """The rows of one shape; the one beside PyTorch is left out where there is no PyTorch."""
  name = f"{case.tokens} tokens, {case.batch} x {case.heads} heads of {case.head_dim}, {case.dtype}"
  name += ", with gradients" if backward else ""
  ours = call(self_attention, case, backward)
  naive = call(_jax, case, backward)
  timing, other = alternate(ours, naive, seconds=seconds, units=case.calls, least=5)
  yield Row(name, "call, wall", timing, f"jax {jax.__version__}", other)
  theirs = find_peer("torch_ops.py", {"what": "attention", "backward": backward, **dataclasses.asdict(case)})
  if theirs is None:
    yield Row(name, "call, wall", timing, note=f"no PyTorch: set {PEER_PYTHON}")
    return
  with theirs:
    timing, other = alternate(ours, theirs.step, seconds=seconds, units=case.calls, least=5)
    yield Row(name, "call, wall", timing, theirs.name, other)


def call(function: Callable[..., Any], case: Case, backward: bool) -> Callable[[], None]:
  """A repetition of compiled calls."""
  qkv, gradient = case.arrays()
  work = (lambda qkv: jax.vjp(function, qkv)[1](gradient)) if backward else function
  compiled = jax.jit(work).lower(qkv).compile()

  def repetition() -> None:
    for _ in range(case.calls):
      done = compiled(qkv)
    jax.block_until_ready(done)

  return repetition


def _jax(qkv: jax.Array) -> jax.Array:
  return jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)), implementation="xla")
