"""Where the devices of several hosts, or slices, come to lie in a mesh. GPUs and TPUs are stand-ins here."""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np
import pytest

from vit_jax import parallel
from vit_jax.parallel.mesh import placed, slice_index

AXES = dict(replica=1, data=1, fsdp=1, tensor=1)


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What JAX says of a GPU: on several hosts, each host is a slice."""

  id: int
  slice_index: int
  platform: str = "gpu"
  device_kind: str = "NVIDIA H100 80GB HBM3"


def gpus(hosts, of_each=8):
  """As JAX lists them, if its hosts come in any order."""
  return [Gpu(host * of_each + n, host) for host in reversed(range(hosts)) for n in range(of_each)]


def hosts_along(mesh, axis):
  """The hosts met along an axis, from the first device on."""
  line = mesh[tuple(slice(None) if i == axis else 0 for i in range(4))]
  return [device.slice_index for device in line]


@pytest.mark.parametrize("shape", [(1, 1, 32, 1), (4, 1, 8, 1), (1, 4, 8, 1), (2, 2, 8, 1), (1, 1, 4, 8), (2, 1, 4, 4)])
def test_all_devices_of_several_hosts_are_in_the_mesh_and_tensor_stays_within_one(shape):
  mesh = placed(shape, gpus(4), slice_index)
  assert mesh.shape == shape and {device.id for device in mesh.flat} == set(range(32))
  assert len(set(hosts_along(mesh, 3))) == 1


def test_the_outer_axes_are_those_between_hosts():
  mesh = placed((4, 1, 8, 1), gpus(4), slice_index)
  assert hosts_along(mesh, 0) == [0, 1, 2, 3] and len(set(hosts_along(mesh, 2))) == 1
  mesh = placed((1, 1, 32, 1), gpus(4), slice_index)
  assert hosts_along(mesh, 2) == sorted([0, 1, 2, 3] * 8)
  mesh = placed((2, 1, 16, 1), gpus(4), slice_index)
  assert hosts_along(mesh, 0) == [0, 2] and hosts_along(mesh, 2) == [0] * 8 + [1] * 8


def test_tensor_over_hosts_is_done_with_a_warning(caplog):
  mesh = placed((1, 1, 1, 16), gpus(2), slice_index)
  assert hosts_along(mesh, 3) == [0] * 8 + [1] * 8
  assert "mesh.tensor=16" in caplog.text


def test_hosts_with_unlike_numbers_of_gpus_still_make_a_mesh():
  mesh = placed((1, 12, 1, 1), gpus(1) + [Gpu(8 + n, 1) for n in range(4)], slice_index)
  assert [device.id for device in mesh.flat] == list(range(12))


def test_a_mesh_of_one_host_is_that_of_jax():
  mesh = parallel.make_mesh(AXES | {"data": 2, "fsdp": -1})
  assert list(mesh.devices.flat) == list(jax.make_mesh((1, 2, 4, 1), mesh.axis_names).devices.flat)


def test_sharded_arrays_live_on_a_mesh_of_two_slices():
  """Simulated devices, the even ones taken for one slice and the odd ones for another."""
  devices = placed((1, 2, 2, 2), jax.devices()[:8], lambda device: device.id % 2)
  assert [device.id % 2 for device in devices[0, :, 0, 0]] == [0, 1]
  mesh = jax.sharding.Mesh(devices, tuple(AXES))
  values = np.arange(16.0).reshape(8, 2)
  array = jax.device_put(values, parallel.batch_sharding(mesh))
  np.testing.assert_array_equal(jax.jit(lambda x: x * 2)(array), values * 2)


def test_a_mesh_that_cuts_a_dimension_of_a_tpus_torus_is_made():
  """32 x 2 on 4 x 4 x 4 chips: `jax.make_mesh` raises NotImplementedError."""
  pytest.importorskip("libtpu")
  from jax.experimental import topologies

  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4").devices
  mesh = parallel.make_mesh(AXES | {"data": 2, "fsdp": 32}, devices)
  assert len({device.id for device in mesh.devices.flat}) == 64
