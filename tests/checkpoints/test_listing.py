"""What a run's folder holds, whole or not."""

from __future__ import annotations

import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import cli
from vit_jax.checkpoints import Checkpoints, NotSaved, survey

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Steps 1 to 4: whole, with a changed bit, without metadata, whole; one unfinished, one set aside."""
  workdir = tmp_path_factory.mktemp("listing")
  with Checkpoints(workdir, keep=9) as checkpoints:
    for step in (1, 2, 3, 4):
      state = {"x": jnp.asarray(np.random.default_rng(step).normal(size=(100_000,)), jnp.float32), "n": jnp.int32(step)}
      checkpoints.save(step, state, {}, {}, {"loss": 10.0 / step})
  root = workdir / "checkpoints"
  flip_a_bit(root / "2")
  shutil.rmtree(root / "3" / "meta")
  shutil.copytree(root / "4" / "data", root / "5.orbax-checkpoint-tmp" / "data")
  shutil.copytree(root / "1", workdir / "checkpoints_damaged" / "0")
  return workdir


def flip_a_bit(step: pathlib.Path) -> None:
  """In the middle of the largest file: the data of an array."""
  largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 4
  largest.write_bytes(content)


def states(workdir: os.PathLike, **options: bool) -> dict[str, str]:
  return {entry.path: entry.state for entry in survey(workdir, **options)}


def test_every_kind_of_folder_is_told_from_the_others(run: pathlib.Path):
  others = {"checkpoints/5.orbax-checkpoint-tmp": "unfinished", "checkpoints_damaged/0": "set aside"}
  steps = {f"checkpoints/{step}": "whole" for step in (1, 2, 3, 4)} | {"checkpoints/3": "damaged"}
  assert states(run) == steps | others
  assert states(run, verify=True) == steps | {"checkpoints/2": "damaged"} | others


def test_the_command_shows_steps_and_where_a_run_goes_on(run: pathlib.Path, capsys: pytest.CaptureFixture):
  assert cli.main(["inspect", "checkpoints", f"--workdir={run}", "--verify"]) == 0
  out = capsys.readouterr().out
  lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("checkpoints")}
  assert "whole" in lines["checkpoints/4"] and "2.5000" in lines["checkpoints/4"] and "8 devices, 1 process" in out
  assert "bits have changed: x" in lines["checkpoints/2"] and "'meta' is missing" in lines["checkpoints/3"]
  assert "kB" in lines["checkpoints/1"] and "goes on from checkpoints/4" in out


def test_a_folder_without_checkpoints_is_an_error(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
  with pytest.raises(NotSaved, match="no saved step"):
    survey(tmp_path)
  assert cli.main(["inspect", "checkpoints", f"--workdir={tmp_path}"]) == 2


def test_text_that_is_damaged_is_said_in_words(run: pathlib.Path, tmp_path: pathlib.Path):
  shutil.copytree(run / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
  (tmp_path / "checkpoints" / "4" / "meta" / "metadata").write_bytes(b"\xff\xfe\x80")
  (damaged,) = survey(tmp_path)
  assert damaged.problem == "OSError: 'meta' is damaged: it cannot be read as JSON"


@pytest.mark.parametrize("name", ["meta/metadata", "data/metadata", "state/_METADATA", "state/manifest.ocdbt"])
def test_nobody_waits_for_a_pipe_in_the_place_of_a_file(run: pathlib.Path, tmp_path: pathlib.Path, name: str):
  shutil.copytree(run / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
  path = tmp_path / "checkpoints" / "4" / name
  path.unlink()
  os.mkfifo(path)
  (damaged,) = survey(tmp_path, verify=True)
  assert damaged.problem == f"OSError: {name} is no file"


@pytest.mark.parametrize(
  ("name", "content", "said"),
  [
    ("_METADATA", b"[" * 100_000, "state/_METADATA, line 1: is nested too deeply to be read"),
    ("_METADATA", b"null", "state/_METADATA, line 1: must be an object of JSON, not NoneType"),
    ("manifest.ocdbt", b"", "the files of its arrays are damaged or missing (first met for "),
    ("manifest.ocdbt", bytes(range(256)), "the files of its arrays are damaged or missing (first met for "),
  ],
)
def test_damaged_descriptions_of_arrays_are_said_in_words(run: pathlib.Path, tmp_path, name, content, said):
  shutil.copytree(run / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
  (tmp_path / "checkpoints" / "4" / "state" / name).write_bytes(content)
  (damaged,) = survey(tmp_path, verify=True)
  assert said in damaged.problem and "{" not in damaged.problem


def test_links_that_lead_nowhere_and_other_names_are_listed(run: pathlib.Path, tmp_path: pathlib.Path):
  root = tmp_path / "checkpoints"
  shutil.copytree(run / "checkpoints" / "4", root / "4")
  (root / "5").symlink_to(tmp_path / "none")
  (root / "6").symlink_to("6")
  (root / "007").mkdir()
  (root / "8").write_text("")
  assert states(tmp_path) == {"checkpoints/4": "whole"} | {f"checkpoints/{step}": "damaged" for step in (5, 6)} | {
    f"checkpoints/{name}": "no step" for name in ("007", "8")
  }
