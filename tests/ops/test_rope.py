"""Rotary tables and their application against the reference."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import Golden
from vit_jax.ops import rope

GOLDEN = Golden("rope_tables")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
ATOL = {"float32": 5e-6, "bfloat16": 0.0}  # every rounding of the bfloat16 tables is reproduced


def periods(settings, dtype):
  return rope.periods(
    settings["head_dim"],
    base=settings.get("base"),
    min_period=settings.get("min_period"),
    max_period=settings.get("max_period"),
    dtype=dtype,
  )


@pytest.mark.parametrize("case", sorted(name for name, s in GOLDEN.settings.items() if "dtype" in s))
def test_tables_equal_the_reference(case):
  settings, g = GOLDEN.settings[case], GOLDEN.under(case)
  dtype = DTYPES[settings["dtype"]]
  period = periods(settings, dtype)
  np.testing.assert_allclose(period, g["periods"], rtol=1e-6 if dtype == "float32" else 0)
  for grid in ("14x14", "7x7", "6x10", "3x1"):
    height, width = map(int, grid.split("x"))
    coords = rope.coordinates(height, width, normalize=settings["normalize_coords"], dtype=dtype)
    sin, cos = rope.tables(coords, period, dtype=dtype)
    np.testing.assert_allclose(np.float32(sin), g[f"{grid}/sin"], rtol=0, atol=ATOL[dtype])
    np.testing.assert_allclose(np.float32(cos), g[f"{grid}/cos"], rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("case", ["aug_shift", "aug_jitter", "aug_rescale", "aug_all"])
def test_augmented_tables_equal_the_reference(case):
  settings, g = GOLDEN.settings[case], GOLDEN.under(case)
  coords = rope.coordinates(*settings["grid"], normalize=settings["normalize_coords"], dtype="float32")
  draws = {name: g.get(f"draw_{name}") for name in ("shift", "log_jitter", "log_rescale")}
  moved = rope.augment(coords, **draws, dtype="float32")
  sin, cos = rope.tables(moved, periods(settings, "float32"), dtype="float32")
  np.testing.assert_allclose(sin, g["sin"], rtol=0, atol=5e-6)
  np.testing.assert_allclose(cos, g["cos"], rtol=0, atol=5e-6)


@pytest.mark.parametrize(("dtype", "name"), [("float32", "q_rot"), ("bfloat16", "q_rot_bf16")])
def test_rotation_equals_the_reference_and_leaves_the_prefix_alone(dtype, name):
  g = GOLDEN.under("apply")
  coords = rope.coordinates(6, 10, normalize="separate", dtype=dtype)
  tables = rope.tables(coords, periods({"head_dim": 16, "base": 100.0}, dtype), dtype=dtype)
  rotated = rope.rotate(jnp.asarray(g["q"].transpose(0, 2, 1, 3)), *tables)  # [B, T, H, d]
  np.testing.assert_allclose(
    np.asarray(rotated).transpose(0, 2, 1, 3), g[name], rtol=0, atol=1e-5 if dtype == "float32" else 0
  )


def test_wrong_settings_are_named():
  with pytest.raises(ValueError, match="multiple of 4"):
    rope.periods(6, base=100.0, min_period=None, max_period=None, dtype="float32")
  with pytest.raises(ValueError, match="rope.base"):
    rope.periods(8, base=100.0, min_period=1.0, max_period=2.0, dtype="float32")
  with pytest.raises(ValueError, match="rope.normalize"):
    rope.coordinates(2, 2, normalize="mean", dtype="float32")


def test_groups_of_rows_have_tables_of_their_own():
  rng = np.random.default_rng(0)
  x, sin, cos = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((6, 5, 2, 8), (3, 4, 8), (3, 4, 8)))
  expected = [rope.rotate(x[2 * i : 2 * i + 2], sin[i], cos[i]) for i in range(3)]
  np.testing.assert_array_equal(rope.rotate(x, sin, cos), np.concatenate(expected))
