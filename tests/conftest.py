"""Settings for all tests: CPU with eight simulated devices, and helpers shared by rooms."""

from __future__ import annotations

import contextlib
import os
import resource

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# LLVM's optimisations off, here and in the processes that tests start: compiling is most of a test's time.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and tables would be as narrow as that

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
