"""Settings for all tests: CPU with eight simulated devices, and helpers shared by rooms."""

from __future__ import annotations

import contextlib

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
  """Runs a test in float64."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.enable_x64(True))
    yield
