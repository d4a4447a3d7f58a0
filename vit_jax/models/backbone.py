"""What all backbones have in common: one call for a batch of images or for a list of batches of several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array

from vit_jax.models.features import Draws, Features
from vit_jax.models.inputs import check_images


class Backbone(nn.Module):
  """A backbone; its kinds say how they compute the features of a list of batches (`_forward`) and what they draw."""

  @property
  def whole(self) -> int:
    """Pixels of which height and width of an image must be multiples."""
    return 1

  def __call__(
    self,
    images: Array | Sequence[Array],
    *,
    masks: Array | Sequence[Array | None] | None = None,
    train: bool = False,
    groups: int = 1,
    draws: Sequence[Draws] | None = None,
  ) -> Features | list[Features]:
    """Features of one batch of images, or of a list of batches of different resolutions in one pass over the layers.

    Args:
      images: [B, H, W, C], normalised; or a list of such.
      masks: [B, N] bool, True where the mask token replaces the patch; or a list (None: unmasked). A ConvNeXt has no
        mask token and ignores them, so that all backbones are called alike.
      train: stochastic depth and coordinate augmentation on; entry 1 of a list counts as the local crops.
      groups: loss groups: contiguous equal chunks of the rows, within which stochastic depth draws its subsets.
      draws: the random choices per list entry; None: drawn from the rng streams.

    Raises:
      ValueError: if images are no batch [B, H, W, C] of whole patches with the channels of the model, a batch does not
        divide into `groups`, or there are masks and no mask token.
    """
    if not isinstance(images, Sequence):
      return self([images], masks=[masks], train=train, groups=groups, draws=draws)[0]
    for batch in images:
      check_images(batch, self.in_channels, self.whole, whole=not self.is_initializing())
    masks = masks if masks is not None else [None] * len(images)
    if draws is None:
      draws = self.draw([batch.shape[0] for batch in images], groups=groups) if train else [Draws()] * len(images)
    return self._forward(images, masks, draws, train)

  def draw(self, rows: Sequence[int], *, groups: int = 1) -> list[Draws]:
    """The random choices that a training pass over batches of so many rows makes, one entry a batch.

    Raises:
      ValueError: if a batch does not divide into `groups`.
    """
    for size in rows:
      if size % groups:
        raise ValueError(f"{size} rows do not divide into {groups} loss groups.")
    return [self._draw(entry, size, groups) for entry, size in enumerate(rows)]

  def _forward(
    self, images: Sequence[Array], masks: Sequence[Array | None], draws: Sequence[Draws], train: bool
  ) -> list[Features]:
    raise NotImplementedError

  def _draw(self, entry: int, rows: int, groups: int) -> Draws:
    raise NotImplementedError

  def _wanted(self, layers: Sequence[int]) -> list[int]:
    """The indices of layers that `intermediate` is asked for, ascending and from 0."""
    wanted = sorted({layer % self.depth for layer in layers if -self.depth <= layer < self.depth})
    if len(wanted) != len(layers):
      raise ValueError(f"layers {tuple(layers)} must be distinct indices below depth {self.depth}.")
    return wanted
