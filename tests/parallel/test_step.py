"""The same step on every mesh: the same losses, and nothing but parameters, gradients and sums on the wires."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from tests.parallel.step import IMAGES, PROTOTYPES, Compiled, compiled, losses
from vit_jax import parallel
from vit_jax.inspect.collectives import collectives, moved_activations

MESHES = {
  "data": {"data": -1},
  "fsdp": {"data": 1, "fsdp": -1},
  "tensor": {"data": -1, "tensor": 4},
  "mixed": {"data": -1, "fsdp": 2, "tensor": 2},
  "replicas": {"replica": 2, "data": 2, "fsdp": 2},
}
FAST = [("fsdp", 8, 3), ("mixed", 8, 1)]
GRID = [(name, 8, zero) for name in MESHES for zero in (3, 1) if zero == 3 or "fsdp" in MESHES[name]]
GRID += [("data", 2, 3), ("data", 4, 3), ("fsdp", 2, 3), ("fsdp", 4, 1), ("tensor", 4, 3), ("mixed", 4, 3)]
CASES = FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in GRID if case not in FAST]


@functools.cache
def on(name: str, num_devices: int, zero: int) -> Compiled:
  """The step on one of the meshes, compiled once for all tests."""
  axes = {f"mesh.{axis}": size for axis, size in MESHES[name].items()}
  return compiled(num_devices, **axes, **{"mesh.zero": zero})


@functools.cache
def expected() -> list[dict[str, float]]:
  """Ten steps on one device."""
  return losses(compiled(1))


@pytest.mark.parametrize(("name", "num_devices", "zero"), CASES)
def test_ten_steps_have_one_devices_losses(name, num_devices, zero):
  ours = losses(on(name, num_devices, zero))
  for step, (a, b) in enumerate(zip(ours, expected(), strict=True)):
    assert a.keys() == b.keys()
    for term in ("loss", "dino_local", "dino_global", "ibot", "koleo", "gram", "grad_norm/backbone"):
      np.testing.assert_allclose(a[term], b[term], rtol=2e-5 if step == 0 else 1e-3, err_msg=f"{term}, step {step}")
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


@pytest.mark.parametrize(("name", "num_devices", "zero"), CASES)
def test_no_activation_and_no_logit_is_gathered(name, num_devices, zero):
  what = on(name, num_devices, zero)
  found = collectives(what.step.as_text(), what.mesh)
  assert found
  assert offences(what, found) == []


def offences(what: Compiled, found: list) -> list:
  config = what.config
  tokens = (config.crops.global_size // config.model.patch_size) ** 2 + 1 + config.model.num_registers
  shapes = [leaf.shape for leaf in jax.tree.leaves(what.shapes.student)]
  judge = functools.partial(
    moved_activations,
    mesh=what.mesh,
    parameters=shapes,
    batch_axes=parallel.BATCH_AXES,
    largest_sum=config.model.width**2,
    prototypes=PROTOTYPES,
  )
  return judge(found)
