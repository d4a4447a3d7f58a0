"""Settings for all tests: CPU with eight simulated devices, and helpers shared by rooms."""

from __future__ import annotations

import contextlib
import resource

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


_MUCH = 3 * 2**20  # KiB; what one test process may keep before compiled programs are given up


@pytest.fixture(autouse=True, scope="module")
def give_up_compiled_programs():
  """Every compiled function stays in memory for ever; the whole suite would need several GB of them."""
  yield
  if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > _MUCH:
    jax.clear_caches()


@pytest.fixture
def x64():
  """Runs a test in float64."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.enable_x64(True))
    yield
