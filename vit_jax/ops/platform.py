"""The kind of device that a computation is for, which decides how some of them are written."""

from __future__ import annotations

import jax


def platform() -> str:
  """The platform of the mesh around this, which may be of described devices, or else this machine's: "cpu", "tpu"…"""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
