"""Losses: pure functions of arrays."""

from vit_jax.losses.centering import softmax_center
from vit_jax.losses.dino import dino
from vit_jax.losses.gram import gram
from vit_jax.losses.ibot import ibot
from vit_jax.losses.koleo import koleo
from vit_jax.losses.sinkhorn import sinkhorn_knopp

__all__ = ["dino", "gram", "ibot", "koleo", "sinkhorn_knopp", "softmax_center"]
