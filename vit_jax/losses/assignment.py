"""Soft assignments of samples to prototypes, kept as scores and log factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.losses import chunks
from vit_jax.ops.normalize import upcast


class Assignment(NamedTuple):
  """Probabilities p = exp(logits / temperature + prototype + sample), which no array holds.

  Every assignment of samples to prototypes that scales rows and columns of exp(logits / temperature) has this form:
  Sinkhorn-Knopp and centred softmax alike. The scores stay in the type they were computed in; the probabilities, which
  need float32, are made where and when they are used, for as many samples as fit.

  Attributes:
    logits: [..., K] teacher scores, of any float type.
    sample: [...] log factor of each sample, float32.
    prototype: [K] log factor of each prototype, float32. None: taken out by `rows`.
    temperature: []. None: taken out by `rows`.
  """

  logits: Array
  sample: Array
  prototype: Array | None
  temperature: Array | None

  def logs(self) -> Float[Array, "... K"]:
    """log p in float32."""
    return upcast(self.logits) / self.temperature + self.prototype + self.sample[..., None]

  def probs(self) -> Float[Array, "... K"]:
    """p in float32."""
    return jnp.exp(self.logs())

  def finite(self) -> Float[Array, ""]:
    """Whether all probabilities are: a score that is not finite shows in the factor of its sample."""
    return jnp.all(jnp.isfinite(self.sample))

  def rows(self) -> Assignment:
    """What each sample has for itself; `shared_with` undoes it."""
    return self._replace(prototype=None, temperature=None)

  def shared_with(self, whole: Assignment) -> Assignment:
    """Some of the `rows` of an assignment, with what all samples of the whole share."""
    return self._replace(prototype=whole.prototype, temperature=whole.temperature)

  def reshape(self, *leading: int) -> Assignment:
    """The samples in an array of another shape."""
    logits = chunks.with_scores(chunks.with_scores(self.logits).reshape(*leading, self.logits.shape[-1]))
    return self._replace(logits=logits, sample=self.sample.reshape(leading))


def centered(
  logits: Float[Array, "N K"], center: Float[Array, " K"], temperature: float | Array, *, chunk: int | None = None
) -> Assignment:
  """`softmax_center` as an assignment; `chunk` as in `balanced`."""
  temperature = jnp.asarray(temperature, jnp.promote_types(logits.dtype, jnp.float32))
  prototype = -upcast(center) / temperature  # [K]
  rows = _Rows(logits, temperature, chunk)
  return Assignment(logits, rows.samples(prototype)[0], prototype, temperature)


def balanced(
  logits: Float[Array, "N K"], temperature: float | Array, *, iterations: int = 3, chunk: int | None = None
) -> Assignment:
  """`sinkhorn_knopp` as an assignment.

  An iteration is one pass over the scores, chunk by chunk: the factors of the samples of a chunk, and with them what
  its probabilities add to every prototype. That sum needs no maximum to be safe: every probability is at most 1, and
  one of every prototype is at least 1 / (N K), as the prototypes summed to 1 before the samples were scaled.

  Args:
    logits, temperature, iterations: as of `sinkhorn_knopp`.
    chunk: samples of a device that are taken at once; None: as many as have `chunks.CHUNK_SCORES` scores.
  """
  temperature = jnp.asarray(temperature, jnp.promote_types(logits.dtype, jnp.float32))
  if not logits.shape[0]:  # nothing has a share of any prototype
    nothing = jnp.zeros((), temperature.dtype)
    return Assignment(logits, jnp.full(0, nothing), jnp.full(logits.shape[1], nothing), temperature)
  rows = _Rows(logits, temperature, chunk)
  prototype = -rows.column_logsumexp()  # [K]
  for _ in range(iterations - 1):
    prototype -= jnp.log(rows.samples(prototype)[1])
  return Assignment(logits, rows.samples(prototype)[0], prototype, temperature)


class _Rows:
  """Sums over the scores of samples, in float32, which no array holds for more than a chunk of them."""

  def __init__(self, logits: Float[Array, "N K"], temperature: Array, chunk: int | None):
    self._logits, self._temperature = (
      chunks.with_scores(chunks.shares(chunks.with_scores(logits))),
      temperature,
    )  # [x, n, K]
    self._local = self._logits.shape[1]
    self._chunk = chunks.chunk_size(self._local, logits.shape[1], chunk)

  def column_logsumexp(self) -> Float[Array, " K"]:
    """log of the sum of exp(logits / temperature) over all samples."""

    def one(so_far: tuple[Array, Array], scaled: Array, new: Array, _: Array) -> tuple[Array, Array]:
      largest, total = so_far
      scaled = jnp.where(new[:, None], scaled, -jnp.inf)
      larger = jnp.maximum(largest, jnp.max(scaled, axis=1))  # [x, K]
      return larger, total * jnp.exp(largest - larger) + jnp.sum(jnp.exp(scaled - larger[:, None]), axis=1)

    shape = (self._logits.shape[0], self._logits.shape[2])
    empty = jnp.full(shape, -jnp.inf, self._temperature.dtype), jnp.zeros(shape, self._temperature.dtype)
    largest, total = self._over_chunks(one, jax.tree.map(chunks.with_scores, empty))
    overall = jnp.max(largest, axis=0)  # [K]
    return overall + jnp.log(jnp.sum(total * jnp.exp(largest - overall), axis=0))

  def samples(self, prototype: Float[Array, " K"]) -> tuple[Float[Array, " N"], Float[Array, " K"]]:
    """The log factors with which every sample sums to 1, and what all samples together then have of each prototype."""

    def one(so_far: tuple[Array, Array], scaled: Array, new: Array, start: Array) -> tuple[Array, Array]:
      sample, total = so_far
      scaled += prototype
      factors = -jax.nn.logsumexp(scaled, axis=-1)  # [x, c]
      probs = jnp.where(new[:, None], jnp.exp(scaled + factors[..., None]), 0.0)  # [x, c, K]
      return jax.lax.dynamic_update_slice_in_dim(sample, factors, start, axis=1), total + jnp.sum(probs, axis=1)

    sample = chunks.on_devices(jnp.zeros(self._logits.shape[:2], self._temperature.dtype))
    total = jnp.zeros((self._logits.shape[0], prototype.shape[0]), self._temperature.dtype)
    sample, total = self._over_chunks(one, (sample, chunks.with_scores(total)))
    return sample.reshape(-1), jnp.sum(total, axis=0)

  def _over_chunks(self, one: Callable, empty: tuple[Array, Array]) -> tuple[Array, Array]:
    """`one(so_far, scaled scores [x, c, K], which samples are new [c], start)` over all chunks."""

    def turn(so_far: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
      start, new = chunks.place(index, self._chunk, self._local)
      part = jax.lax.dynamic_slice_in_dim(self._logits, start, self._chunk, axis=1)
      return one(so_far, upcast(part) / self._temperature, new, start), None

    if self._chunk == self._local:
      return turn(empty, jnp.zeros((), jnp.int32))[0]
    return jax.lax.scan(turn, empty, jnp.arange(-(-self._local // self._chunk)))[0]
