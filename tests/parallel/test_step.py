"""The same step on every mesh: the same losses, and nothing but parameters, gradients and sums on the wires."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from tests.parallel.collectives import moved_activations
from tests.parallel.step import IMAGES, PROTOTYPES, Compiled, compiled, laid_out, losses
from vit_jax import parallel
from vit_jax.inspect.collectives import Moved, moved
from vit_jax.inspect.hlo import Program

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
  """The step on one of the meshes, compiled once for all tests; with tensor parallelism in micro-batches."""
  axes = {f"mesh.{axis}": size for axis, size in MESHES[name].items()}
  return compiled(num_devices, **axes, **{"mesh.zero": zero, "micro_batches": 2 if "tensor" in MESHES[name] else 1})


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


def offences(what: Compiled, found: list[Moved]) -> list[Moved]:
  """Those of the collectives that a sound step does not have."""
  return moved_activations(
    found,
    what.mesh,
    [leaf.shape for leaf in jax.tree.leaves(what.shapes.student)],
    batch_axes=parallel.BATCH_AXES,
    largest_sum=what.config.model.width**2,
    prototypes=PROTOTYPES,
  )


@pytest.mark.parametrize(("name", "num_devices", "zero"), CASES)
def test_no_activation_and_no_logit_is_gathered(name, num_devices, zero):
  what = on(name, num_devices, zero)
  found = moved(Program(what.step.as_text()), what.mesh)
  assert found and not offences(what, found)


def test_every_activation_of_the_step_would_be_found():
  """No size of one is by chance that of a parameter: a gather of it could not be told from one of parameters."""
  what = laid_out(8, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
  c = what.config
  images, width = c.batch_size, c.model.width
  tokens = (c.crops.global_size // c.model.patch_size) ** 2 + 1 + c.model.num_registers
  masked = what.batch["mask_indices"].size
  shapes = [(2 * images, width), (2 * images, tokens, width), (2 * images, tokens, c.model.mlp_hidden)]
  shapes += [(2 * images, c.dino.prototypes), (masked, c.ibot.prototypes), (masked, width), (masked, c.ibot.bottleneck)]
  whole = [Moved("all-gather", "f32", shape, ("fsdp",), "") for shape in shapes]
  assert offences(what, whole) == whole
  over_tensor = [(size // 8, *rest) for size, *rest in shapes]
  parts = [Moved("all-to-all", "f32", shape, ("tensor",), "") for shape in over_tensor]
  assert offences(what, parts) == parts


def test_memory_per_device_does_not_grow_with_the_number_of_devices():
  """Where an activation is not constrained, every device computes it for all images."""
  two = compiled(2, **{"mesh.data": 1, "mesh.fsdp": 2, "batch_size": 2 * IMAGES})
  memory = [what.step.memory_analysis() for what in (two, on(*FAST[0]))]
  # XLA puts temporaries into the buffers of the results, too, which are the larger the fewer devices share the state.
  few, many = (m.temp_size_in_bytes + m.output_size_in_bytes for m in memory)
  assert many < few


@pytest.mark.slow
@pytest.mark.parametrize(
  "overrides",
  [
    {"crops.gram_size": 48, "micro_batches": 2, "gram.per_image": False, "gram.tokens": "masked", "gram.stats": True},
    {"koleo.topk": 2, "koleo.group_size": 4, "gram.source": "ema", "model.remat": "blocks", "model.mlp": "swiglu"},
    {
      "model.dtype": "bfloat16",
      "model.remat": "dots",
      "ibot.centering": "sinkhorn_knopp",
      "gram.refresh.every": "2 steps",
    },
  ],
  ids=lambda overrides: ",".join(overrides),
)
def test_no_setting_of_the_method_gathers(overrides):
  axes = {f"mesh.{axis}": size for axis, size in MESHES["mixed"].items()}
  what = compiled(8, **axes | overrides)
  assert not offences(what, moved(Program(what.step.as_text()), what.mesh))


@pytest.mark.slow
def test_neighbours_among_the_whole_batch_cost_its_class_tokens_and_no_more():
  what = compiled(8, **{"mesh.data": -1, "koleo.group_size": 8 * IMAGES})
  found = offences(what, moved(Program(what.step.as_text()), what.mesh))
  assert found and all(one.size <= 2 * what.config.batch_size * what.config.model.width for one in found)
