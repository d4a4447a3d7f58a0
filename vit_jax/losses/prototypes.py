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

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.losses.assignment import Assignment
from vit_jax.ops.normalize import upcast

CHUNK_SCORES = 2**25  # scores of a device in a chunk, where no other size is asked for: 128 MiB in float32


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
    chunk: units of a device that are taken at once; None: as many as have `CHUNK_SCORES` scores. Where the mesh
      spreads units over devices, each has chunks of its own, and the gradients of the kernel are added up at the end.
  """
  units, size = bottleneck.shape[0], math.prod(bottleneck.shape[1:-1]) * kernel.shape[-1]
  shards = math.gcd(units, _devices_along("batch"))
  size //= math.gcd(size, _devices_along("prototypes"))
  local = units // shards
  chunk = min(local, chunk or max(1, CHUNK_SCORES // size))
  chunk = -(-local // -(-local // chunk))  # chunks of about the same size
  split = lambda x: _spread(x.reshape(shards, local, *x.shape[1:]))  # noqa: E731
  logits = split(targets.logits)
  logits = nn.with_logical_constraint(logits, ("batch", None, None, "prototypes"))
  targets = targets._replace(logits=logits, sample=split(targets.sample))
  inputs = split(bottleneck), kernel, jax.lax.stop_gradient(targets), jax.lax.stop_gradient(split(weights))
  total, crossed, own = _chunked(*inputs, temperature, chunk)
  return CrossEntropies(total, crossed.reshape(weights.shape), own.reshape(bottleneck.shape[:-1]))


def _devices_along(logical: str) -> int:
  """Over how many devices the mesh and its rules spread a logical axis; 1 without them."""
  mesh, spec = jax.sharding.get_abstract_mesh(), nn.logical_to_mesh_axes((logical,))
  axes = spec[0] if spec else None
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape.get(name, 1) for name in names)


def _spread(x: Float[Array, "shards ..."]) -> Float[Array, "shards ..."]:
  return nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1)))


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
    start = jnp.minimum(index * chunk, num - chunk)  # the last chunk begins earlier: what it has again weighs nothing
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)  # noqa: E731
    new = (start + jnp.arange(chunk) >= index * chunk)[:, None, None]  # [u, 1, 1]
    share = targets._replace(logits=part(targets.logits), sample=part(targets.sample))
    crossed, own, pull = one(part(z), share, jnp.where(new, part(weights), 0))

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
    sums = _Pull(
      _spread(jnp.zeros(z.shape, wide)), nn.with_logical_constraint(by_kernel, ("batch", None, "prototypes"))
    )
  empty = _spread(jnp.zeros(weights.shape, wide)), _spread(jnp.zeros(z.shape[:-1], wide)), sums
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
    scores = nn.with_logical_constraint(scores, ("batch", None, None, "prototypes"))
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
    pull = nn.with_logical_constraint(pull.astype(z.dtype), ("batch", None, None, "prototypes"))
  with jax.named_scope("last_layer"):
    by_bottleneck = jnp.einsum("xusk,dk->xusd", pull, kernel, preferred_element_type=wide)
    by_kernel = jnp.einsum("xusd,xusk->xdk", z, pull, preferred_element_type=wide)
  by_kernel = nn.with_logical_constraint(by_kernel, ("batch", None, "prototypes"))
  return crossed, entropy, _Pull(_spread(by_bottleneck), by_kernel)
