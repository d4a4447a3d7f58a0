"""DINO and iBOT from the bottleneck of the head on: prototype scores, cross-entropies and their gradient, in chunks.

With 65k to 262k prototypes the scores of a batch's tokens are the largest arrays of a step, several times over: scores,
their softmax, targets, the gradient of the scores. Here a chunk of tokens at a time goes through the last layer, the
losses, and straight back: as the weight of every cross-entropy in the total is known beforehand, so is the gradient of
a chunk as soon as its scores are there (Liger Kernel, Hsu et al. 2024, does so for language models). Nothing with K
columns outlives its chunk, and nothing is computed twice.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.losses import chunks
from vit_jax.losses.assignment import Assignment
from vit_jax.ops.normalize import upcast


class CrossEntropies(NamedTuple):
  """What the tokens of a batch lose.

  Attributes:
    total: [], the weighted sum of the cross-entropies; it alone has a gradient.
    crossed: [U, S, T] cross-entropies of targets and student.
    own: [U, S] entropies of the student's assignments.
  """

  total: Array
  crossed: Array
  own: Array


def cross_entropies(
  bottleneck: Float[Array, "U S d"],
  kernel: Float[Array, "d K"],
  targets: Assignment,
  weights: Float[Array, "U S T"],
  *,
  temperature: float = 0.1,
  chunk: int | None = None,
) -> CrossEntropies:
  """Cross-entropies of S student tokens with T teacher tokens of each of U units, such as images.

  The same values as `dino` and `ibot` of the scores `bottleneck @ kernel`, in float32; products take the type of the
  bottleneck and accumulate in float32, and so does the gradient of the kernel over the chunks.

  Args:
    bottleneck: normalised.
    kernel: of the prototype layer, in the type of the parameters.
    targets: of [U, T] teacher tokens.
    weights: of every cross-entropy in the total; without gradient.
    temperature: of the student's softmax.
    chunk: units of a device that are taken at once; None: as many as have `chunks.CHUNK_SCORES` scores. Where the mesh
      spreads units over devices, each has chunks of its own, and the gradients of the kernel are added up at the end.

  Raises:
    ValueError: for other shapes.
  """
  words = "cross_entropies takes a bottleneck [U, S, d], a kernel [d, K], targets [U, T, K] and weights [U, S, T]"
  chex.assert_rank([bottleneck, kernel, weights], [3, 2, 3], custom_message=words, exception_type=ValueError)
  chex.assert_shape(kernel, (bottleneck.shape[2], None), custom_message=words, exception_type=ValueError)
  chex.assert_shape(weights, (*bottleneck.shape[:2], None), custom_message=words, exception_type=ValueError)
  chex.assert_shape(targets.sample, (len(weights), weights.shape[2]), custom_message=words, exception_type=ValueError)
  unit = math.prod(bottleneck.shape[1:-1])
  inputs = jax.tree.map(chunks.shares, (bottleneck, targets.rows(), jax.lax.stop_gradient(weights)))
  rows = inputs[1].reshape(*inputs[1].sample.shape)
  targets = jax.lax.stop_gradient(rows.shared_with(targets))
  # The gradient of the kernel, read and written once a chunk, has as many columns: chunks should have more rows.
  least = 2 * kernel.shape[0] // unit
  chunk = chunks.chunk_size(inputs[0].shape[1], unit * kernel.shape[1], chunk, least=least)
  z, weights_of = chunks.on_devices(inputs[0]), chunks.on_devices(inputs[2])
  total, crossed, own = _chunked(z, kernel, targets, weights_of, temperature, chunk)
  return CrossEntropies(total, crossed.reshape(weights.shape), own.reshape(bottleneck.shape[:-1]))


class _Pull(NamedTuple):
  """Gradients of the total: of the bottleneck [x, u, S, d]; of the kernel [x, d, K], one for each shard."""

  bottleneck: Array
  kernel: Array


# In the following, x shards of u units each: what a device has of the second axis it need not ask others for.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(z: Array, kernel: Array, targets: Assignment, weights: Array, temperature: float, chunk: int) -> tuple:
  return _over_chunks(z, kernel, targets, weights, temperature, chunk, gradient=False)[0]


def _forward(z: Array, kernel: Array, targets: Assignment, weights: Array, temperature: float, chunk: int) -> tuple:
  out, pull = _over_chunks(z, kernel, targets, weights, temperature, chunk, gradient=True)
  by_kernel = nn.with_logical_constraint(jnp.sum(pull.kernel, axis=0), (None, "prototypes"))  # [d, K]
  return out, (pull.bottleneck.astype(z.dtype), by_kernel.astype(kernel.dtype))


def _backward(_temperature: float, _chunk: int, residuals: tuple, cotangents: tuple) -> tuple:
  total = cotangents[0]
  by_bottleneck, by_kernel = (upcast(x) * total for x in residuals)
  return by_bottleneck.astype(residuals[0].dtype), by_kernel.astype(residuals[1].dtype), None, None


_chunked.defvjp(_forward, _backward)


def _over_chunks(
  z: Array, kernel: Array, targets: Assignment, weights: Array, temperature: float, chunk: int, *, gradient: bool
) -> tuple[tuple[Array, Array, Array], _Pull | None]:
  """(total, cross-entropies, entropies) and, where asked for, the gradients of the total."""
  kernel = nn.with_logical_constraint(kernel.astype(z.dtype), (None, "prototypes"))
  one = functools.partial(_one_chunk, kernel, temperature=temperature, gradient=gradient)
  num = z.shape[1]
  if chunk >= num:
    crossed, own, pull = one(z, targets, weights)
    return (jnp.sum(weights * crossed), crossed, own), pull

  def turn(whole: tuple, index: Array) -> tuple[tuple, None]:
    start, new = chunks.place(index, chunk, num)  # what the last chunk has for the second time weighs nothing
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)  # noqa: E731
    share = targets._replace(logits=part(targets.logits), sample=part(targets.sample))
    crossed, own, pull = one(part(z), share, jnp.where(new[:, None, None], part(weights), 0))

    def put(total: Array, values: Array) -> Array:
      return jax.lax.dynamic_update_slice_in_dim(total, values, start, axis=1)

    sums = whole[2]
    if gradient:
      before = part(sums.bottleneck)
      sums = _Pull(put(sums.bottleneck, before + pull.bottleneck), sums.kernel + pull.kernel)
    return (put(whole[0], crossed), put(whole[1], own), sums), None

  wide = jnp.promote_types(z.dtype, jnp.float32)
  sums = None
  if gradient:
    by_kernel = jnp.zeros((z.shape[0], *kernel.shape), wide)
    sums = _Pull(chunks.on_devices(jnp.zeros(z.shape, wide)), chunks.with_scores(by_kernel))
  empty = chunks.on_devices(jnp.zeros(weights.shape, wide)), chunks.on_devices(jnp.zeros(z.shape[:-1], wide)), sums
  (crossed, own, pull), _ = jax.lax.scan(turn, empty, jnp.arange(-(-num // chunk)))
  return (jnp.sum(weights * crossed), crossed, own), pull


def _one_chunk(
  kernel: Float[Array, "d K"],
  z: Float[Array, "x u S d"],
  targets: Assignment,
  weights: Float[Array, "x u S T"],
  *,
  temperature: float,
  gradient: bool,
) -> tuple[Array, Array, _Pull | None]:
  """Cross-entropies [x, u, S, T], entropies [x, u, S] and gradients of a chunk."""
  exact = {"precision": jax.lax.Precision.HIGHEST}
  wide = jnp.promote_types(z.dtype, jnp.float32)
  with jax.named_scope("last_layer"):
    scores = jnp.einsum("xusd,dk->xusk", z, kernel, preferred_element_type=wide)  # [x, u, S, K]
    scores = chunks.with_scores(scores)
  with jax.named_scope("losses"):
    scaled = scores / temperature
    normalizer = jax.nn.logsumexp(scaled, axis=-1)  # [x, u, S]
    own = jnp.exp(scaled - normalizer[..., None])  # [x, u, S, K]
    probs = targets.probs()  # [x, u, T, K]
    mass = jnp.sum(probs, axis=-1)[..., None, :]  # [x, u, 1, T]  1, but for rounding
    agreement = jnp.einsum("xusk,xutk->xust", scaled, probs, **exact)
    crossed = normalizer[..., None] * mass - agreement  # [x, u, S, T]
    entropy = normalizer - jnp.sum(own * scaled, axis=-1)  # [x, u, S]
    if not gradient:
      return crossed, entropy, None
    wanted = jnp.einsum("xust,xutk->xusk", weights, probs, **exact)
    pull = (own * jnp.sum(weights * mass, axis=-1)[..., None] - wanted) / temperature  # [x, u, S, K]
    pull = chunks.with_scores(pull.astype(z.dtype))
  with jax.named_scope("last_layer"):
    by_bottleneck = jnp.einsum("xusk,dk->xusd", pull, kernel, preferred_element_type=wide)
    by_kernel = jnp.einsum("xusd,xusk->xdk", z, pull, preferred_element_type=wide)
  by_kernel = chunks.with_scores(by_kernel)
  return crossed, entropy, _Pull(chunks.on_devices(by_bottleneck), by_kernel)
