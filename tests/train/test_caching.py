"""The persistent compilation cache of a run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vit_jax.train.caching import FOLDER, caching


@pytest.fixture(autouse=True)
def process_without_a_cache():
  """As if JAX_COMPILATION_CACHE_DIR were not set."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def compile_something(number):
  jax.jit(lambda x: jnp.sin(x) * number)(jnp.ones(3)).block_until_ready()


def files(folder):
  return [path.name for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def test_programs_are_kept_in_the_workdir(tmp_path):
  with caching(None, tmp_path):
    compile_something(1.25)
  kept = files(tmp_path / FOLDER)
  assert kept
  compile_something(2.25)  # outside: not kept
  assert files(tmp_path / FOLDER) == kept and jax.config.jax_compilation_cache_dir is None


def test_or_in_a_given_folder_or_not_at_all(tmp_path):
  with caching(str(tmp_path / "given"), tmp_path / "run"):
    compile_something(3.25)
  assert files(tmp_path / "given") and not (tmp_path / "run").exists()
  with caching("off", tmp_path / "run"):
    compile_something(4.25)
  assert not (tmp_path / "run").exists()


def test_the_cache_of_the_process_comes_before_that_of_the_workdir(tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
  with caching(None, tmp_path / "run"):
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
  with caching("off", tmp_path / "run"):
    assert jax.config.jax_compilation_cache_dir is None
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
