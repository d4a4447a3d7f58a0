"""Saving and resuming: exactness, retention, damage, kills, topologies."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import cli
from vit_jax.checkpoints import (
  Checkpoints,
  Damaged,
  Mismatch,
  NotSaved,
  NotWritten,
  check_place,
  latest,
  read_meta,
  restore_params,
  steps,
)

# What tensorstore's threads still report of reads from the files that the tests damage.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"method": "dinov3", "model": {"depth": 2, "rope": None}, "blur": [0.0, 0.9, 0.5]}
DATA = {"epoch": 3, "next": 2**60 + 1}


@flax.struct.dataclass
class State:
  step: jax.Array
  student: Any
  teacher: Any
  gram_teacher: Any
  opt_state: Any
  key: jax.Array
  counters: dict[str, Any]
  apply: Any = flax.struct.field(pytree_node=False, default=len)


def make_state(seed: int = 0, rows: int = 4) -> State:
  def params(key: jax.Array) -> dict:
    kernel = jax.random.normal(key, (rows, 3))
    return {"backbone": {"norm": {"scale": kernel[0], "half": kernel.astype(jnp.bfloat16)}}, "head": {"kernel": kernel}}

  student = params(jax.random.key(seed))
  return State(
    step=jnp.int32(seed),
    student=student,
    teacher=params(jax.random.key(seed + 1)),
    gram_teacher=None,
    opt_state=optax.adamw(1e-3).init(student),
    key=jax.random.split(jax.random.key(seed, impl="rbg"), 2),
    counters={"nan": jnp.int32(seed), "empty": {}},
  )


def assert_same(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def save_steps(workdir: pathlib.Path, *numbers: int, **options: Any) -> None:
  with Checkpoints(workdir, **options) as checkpoints:
    for number in numbers:
      assert checkpoints.save(number, make_state(number), DATA | {"step": number}, CONFIG, {"loss": number / 3})


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("two_steps")
  save_steps(workdir, 1, 2)
  return workdir


@pytest.fixture
def run(two_steps: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of a run with steps 1 and 2, to damage."""
  return pathlib.Path(shutil.copytree(two_steps, tmp_path / "run"))


@pytest.mark.parametrize("abstract", [False, True])
def test_everything_comes_back_exactly(two_steps: pathlib.Path, abstract: bool):
  target = jax.eval_shape(make_state) if abstract else make_state(7)
  restored = Checkpoints(two_steps).restore(target)
  assert restored.step == 2
  assert_same(restored.state, make_state(2))
  assert str(jax.random.key_impl(restored.state.key)) == "rbg"
  assert restored.state.gram_teacher is None and restored.state.apply is len
  assert restored.data_state == DATA | {"step": 2}
  assert restored.config == CONFIG and restored.metrics == {"loss": 2 / 3}
  jax.random.normal(restored.state.key[0])  # still a usable key


def test_parts_of_a_method_that_older_versions_saved_beside_the_others_are_found(tmp_path):
  values = {"gram_teacher": {"scale": jnp.arange(3.0)}, "student": {"scale": jnp.ones(3)}}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, values, DATA, CONFIG, {})
  state = {"own": {"gram_teacher": {"scale": jnp.zeros(3)}}, "student": {"scale": jnp.zeros(3)}}
  restored = Checkpoints(tmp_path).restore(state).state
  assert_same(restored, {"own": {"gram_teacher": values["gram_teacher"]}, "student": values["student"]})


def test_an_older_step_restores_on_request(two_steps: pathlib.Path):
  assert_same(Checkpoints(two_steps).restore(make_state(), step=1).state, make_state(1))
  with pytest.raises(NotSaved, match=r"no step 5; it has \[1, 2\]"):
    Checkpoints(two_steps).restore(make_state(), step=5)


def test_nothing_saved(tmp_path: pathlib.Path):
  checkpoints = Checkpoints(tmp_path / "new")
  assert checkpoints.latest_step() is None and steps(tmp_path / "new") == () and latest(tmp_path) is None
  with pytest.raises(NotSaved, match="no saved step"):
    checkpoints.restore(make_state())
  assert not (tmp_path / "new").exists()


def test_newest_and_every_nth_step_are_kept(tmp_path: pathlib.Path):
  save_steps(tmp_path, *range(1, 9), keep=2, keep_every=3)
  assert steps(tmp_path) == (3, 6, 7, 8)


def test_the_best_step_is_kept_as_long_as_it_is_the_best(tmp_path: pathlib.Path):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4)):
      checkpoints.keep_best({"knn/top1": {"step": best, "value": 0.5}})
      checkpoints.save(step, make_state(step), {}, {}, {}, best={"knn/top1": {"step": best, "value": 0.5}})
      checkpoints.wait()
      assert steps(tmp_path) == {1: (1,), 2: (1, 2), 3: (1, 3), 4: (4,), 5: (4, 5)}[step]
  restored = Checkpoints(tmp_path).restore(make_state())
  assert restored.best == {"knn/top1": {"step": 4, "value": 0.5}} and restored.evaluated


def test_an_evaluation_made_later_completes_its_step(run: pathlib.Path):
  with Checkpoints(run) as checkpoints:
    checkpoints.save(3, make_state(3), DATA, CONFIG, {"loss": 1.0}, evaluated=False)
  assert not Checkpoints(run).restore(make_state()).evaluated
  with Checkpoints(run) as checkpoints:
    checkpoints.evaluated(3, {"loss": 1.0, "knn/top1": 0.5}, {"knn/top1": {"step": 3, "value": 0.5}})
  restored = Checkpoints(run).restore(make_state())
  assert (restored.step, restored.evaluated, restored.metrics) == (3, True, {"loss": 1.0, "knn/top1": 0.5})
  assert restored.best == {"knn/top1": {"step": 3, "value": 0.5}}
  assert_same(restored.state, make_state(3))


def link(path: pathlib.Path, target: pathlib.Path) -> None:
  path.rename(target)
  path.symlink_to(target)


def test_a_step_that_is_a_link_is_read_and_neither_it_nor_its_target_removed(run: pathlib.Path, tmp_path: pathlib.Path):
  elsewhere = tmp_path / "elsewhere"
  link(run / "checkpoints" / "2", elsewhere)
  with Checkpoints(run, keep=1) as checkpoints:
    assert checkpoints.restore(make_state()).step == 2
    for step in (3, 4):
      checkpoints.save(step, make_state(step), DATA, CONFIG, {})
  assert steps(run) == (2, 4) and (run / "checkpoints" / "2").is_symlink()
  assert_same(restore_params(run, ("student",), step=2), make_state(2).student)


@pytest.mark.parametrize("how", ["dangling", "another step", "copied"])
def test_a_link_that_leads_nowhere_or_to_another_step_is_damage(
  run: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, how: str
):
  path = run / "checkpoints" / "3"
  if how == "dangling":
    path.symlink_to(tmp_path / "unmounted")
  elif how == "another step":
    path.symlink_to(run / "checkpoints" / "1")
  else:
    shutil.copytree(run / "checkpoints" / "1", path)
  with Checkpoints(run) as checkpoints, caplog.at_level(logging.WARNING):
    assert checkpoints.restore(make_state()).step == 2
    words = f"it is a link to {tmp_path}/unmounted, where nothing is" if how == "dangling" else "it holds step 1"
    assert words in caplog.text
    assert checkpoints.save(3, make_state(3), DATA, CONFIG, {})
  assert not path.is_symlink() and steps(run) == (1, 2, 3)
  assert_same(Checkpoints(run).restore(make_state(), step=3).state, make_state(3))
  assert_same(Checkpoints(run).restore(make_state(), step=1).state, make_state(1))


@pytest.mark.parametrize("name", ["01", "1e3", "٣", "9" * 5000, "-1", "2.orbax"])
def test_what_is_not_named_as_a_step_is_none(run: pathlib.Path, name: str):
  with contextlib.suppress(OSError):  # too long a name
    (run / "checkpoints" / name).mkdir()
  assert steps(run) == (1, 2)


def test_a_file_in_the_place_of_the_folder_is_no_run(tmp_path: pathlib.Path):
  (tmp_path / "checkpoints").touch()
  assert steps(tmp_path) == ()
  with pytest.raises(Damaged, match="checkpoints: is no folder; put back"):
    check_place(tmp_path)


def test_a_link_to_a_disk_that_is_not_there_is_no_new_start(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture):
  check_place(tmp_path)
  (tmp_path / "checkpoints").symlink_to("/not/mounted")
  metrics = tmp_path / "metrics.jsonl"
  metrics.write_text('{"step": 1, "loss": 1.0}\n')
  for command in (["inspect", "checkpoints"], ["train", "--config=tiny"]):
    assert cli.main([*command, f"--workdir={tmp_path}"]) == 2
    assert "checkpoints: is a link to /not/mounted, where no folder is; put back" in capsys.readouterr().err
  assert metrics.read_text() and not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(("options", "key"), [({"keep": 0}, "keep"), ({"keep_every": 0}, "keep_every")])
def test_impossible_retention_names_the_key(tmp_path: pathlib.Path, options: dict, key: str):
  with pytest.raises(ValueError, match=rf"checkpoint\.{key} .* got 0"):
    Checkpoints(tmp_path, **options)


def test_saving_a_step_twice_keeps_the_first(run: pathlib.Path):
  with Checkpoints(run) as checkpoints:
    assert checkpoints.save(3, make_state(3), {}, {}, {})
    assert not checkpoints.save(3, make_state(4), {}, {}, {})  # while the first may still be written
    assert not checkpoints.save(2, make_state(4), {}, {}, {})
  for step in (2, 3):
    assert_same(Checkpoints(run).restore(make_state(), step=step).state, make_state(step))


def test_the_state_may_be_donated_right_after_saving(tmp_path: pathlib.Path):
  advance = jax.jit(lambda x: x * 3 + 1, donate_argnums=0)
  x, expected = jnp.arange(200_000.0), {}
  with Checkpoints(tmp_path, keep=9) as checkpoints:
    for step in range(4):
      expected[step] = np.array(x)
      checkpoints.save(step, {"x": x}, {}, {}, {})
      x = advance(x)
  for step, value in expected.items():
    np.testing.assert_array_equal(restore_params(tmp_path, (), step)["x"], value)


def test_every_mismatch_is_named_at_once_and_nothing_older_is_tried(run: pathlib.Path):
  state = make_state()
  other = state.replace(
    student=state.student | {"extra_head": jnp.zeros((2, 2))},
    teacher=jax.tree.map(lambda x: x[:2], state.teacher) | {"backbone": {}},
    counters={"nan": jnp.float32(0), "empty": {}},
    key=jax.random.split(jax.random.key(0, impl="threefry2x32"), 2),
  )
  with pytest.raises(Mismatch) as caught:
    Checkpoints(run).restore(other)
  message = str(caught.value)
  for line in (
    "missing in the checkpoint: student/extra_head float32[2, 2]",
    "only in the checkpoint: teacher/backbone/norm/scale float32[3]",
    "only in the checkpoint: teacher/backbone/norm/half bfloat16[4, 3]",
    "differs: teacher/head/kernel is float32[4, 3] in the checkpoint, float32[2, 3] in this run",
    "differs: counters/nan is int32[] in the checkpoint, float32[] in this run",
    "differs: key is key:rbg[2] in the checkpoint, key:threefry2x32[2] in this run",
  ):
    assert line in message
  assert "6 leaves" in message and f"{run}/checkpoints/2" in message


def damage(folder: pathlib.Path, how: str) -> None:
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  largest = max(files, key=lambda path: path.stat().st_size)
  if how == "empty":
    shutil.rmtree(folder)
    folder.mkdir()
  elif how == "half_written":
    shutil.rmtree(folder / "meta")
    shutil.rmtree(folder / "state" / "ocdbt.process_0")
  elif how.startswith("without_"):
    shutil.rmtree(folder / how.removeprefix("without_"))
  elif how == "truncated":
    os.truncate(largest, largest.stat().st_size // 2)
  elif how == "zeroed":  # what a power cut leaves of files that were not flushed
    for path in files:
      os.truncate(path, 0)


@pytest.mark.parametrize(
  "how", ["empty", "half_written", "without_state", "without_data", "without_meta", "truncated", "zeroed"]
)
def test_damage_falls_back_loudly_and_the_run_goes_on(run: pathlib.Path, caplog: pytest.LogCaptureFixture, how: str):
  damage(run / "checkpoints" / "2", how)
  with Checkpoints(run) as checkpoints:
    assert checkpoints.latest_step() == 2  # never mistaken for a run that has not started
    with caplog.at_level(logging.WARNING):
      restored = checkpoints.restore(make_state())
    assert restored.step == 1
    assert_same(restored.state, make_state(1))
    warning = next(r.getMessage() for r in caplog.records if r.name.startswith("vit_jax"))
    assert f"{run}/checkpoints/2 cannot be read" in warning and "trying step 1" in warning
    assert checkpoints.save(2, make_state(2), DATA, CONFIG, {})  # the step comes round again
  assert (run / "checkpoints_damaged" / "2").exists()
  assert_same(Checkpoints(run).restore(make_state()).state, make_state(2))


def test_all_steps_damaged_is_an_error_not_a_new_start(run: pathlib.Path):
  for step in ("1", "2"):
    damage(run / "checkpoints" / step, "truncated")
  with pytest.raises(Damaged, match=r"(?s)None of the saved steps.*step 2: .*step 1: .*To start from zero on purpose"):
    Checkpoints(run).restore(make_state())
  with pytest.raises(Damaged):
    restore_params(run)
  assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_no_damaged_file_ever_gives_a_wrong_state(run: pathlib.Path, how: str):
  """Whatever single file is hit: either step 2 comes back bit for bit, or step 1 does."""
  outcomes = []
  files = sorted(path for path in (run / "checkpoints" / "2").rglob("*") if path.is_file())
  for path in files:
    content = path.read_bytes()
    position = len(content) // 2
    if how == "flip":
      path.write_bytes(content[:position] + bytes([content[position] ^ 0x01]) + content[position + 1 :])
    elif how == "truncate":
      path.write_bytes(content[:position])
    else:
      path.unlink()
    restored = Checkpoints(run).restore(make_state())
    outcomes.append(restored.step)
    assert_same(restored.state, make_state(restored.step))
    assert restored.data_state["step"] == restored.step and restored.metrics["loss"] == restored.step / 3
    path.write_bytes(content)
  assert 1 in outcomes  # the arrays themselves are among the files


def test_a_changed_bit_in_a_large_array_is_found(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
  """Random numbers do not compress: Orbax stores them as they are, and reads whatever is there."""
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, noise(step), {}, {}, {})
  largest = max((tmp_path / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 3] ^= 16
  largest.write_bytes(content)
  with caplog.at_level(logging.WARNING):
    restored = Checkpoints(tmp_path).restore(noise(0))
  assert restored.step == 1 and "checkpoints/2 cannot be read" in caplog.text and "bits have changed: x" in caplog.text
  assert_same(restored.state, noise(1))
  assert_same(restore_params(tmp_path, ()), noise(1))
  with pytest.raises(Damaged, match="bits have changed"):
    restore_params(tmp_path, (), step=2)


@contextlib.contextmanager
def full_disk(size: int = 100_000) -> Iterator[None]:
  """Files cannot grow beyond so many bytes: writing fails as on a full disk."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def noise(seed: int) -> dict[str, jax.Array]:
  return {"x": jnp.asarray(np.random.default_rng(seed).normal(size=(200_000,)), jnp.float32)}


def end_of_save(checkpoints: Checkpoints) -> None:
  """Steps go by until the save in the background has ended."""
  for _ in range(3000):
    checkpoints.poll()
    if checkpoints._writing is None:
      return
    time.sleep(0.02)
  raise TimeoutError


def test_a_save_that_fails_is_said_and_loses_nothing(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.save(1, noise(1), {"at": 1}, {}, {})
    checkpoints.wait()
    with full_disk():
      checkpoints.save(2, noise(2), {"at": 2}, {}, {})
      end_of_save(checkpoints)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]  # once, not by every thread
    assert "Step 2 could not be saved" in said and "File too large" in said and "The newest checkpoint is 1" in said
    assert steps(tmp_path) == (1,)  # although only one is to be kept
    assert_same(Checkpoints(tmp_path).restore(noise(0)).state, noise(1))
    assert checkpoints.save(3, noise(3), {"at": 3}, {}, {})  # there is space again
  assert steps(tmp_path) == (3,) and [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_disk_that_stays_full_stops_the_run_and_says_what_is_whole(tmp_path: pathlib.Path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, noise(1), {}, {}, {})
  checkpoints.wait()
  with full_disk():
    for step in (2, 3):
      checkpoints.save(step, noise(step), {}, {}, {})
      end_of_save(checkpoints)
    checkpoints.save(4, noise(4), {}, {}, {})
    with pytest.raises(NotWritten, match=r"3 times in a row.*Step 1 is whole.*disk full"):
      end_of_save(checkpoints)
  with full_disk(), pytest.raises(NotWritten, match="saving failed"), Checkpoints(tmp_path) as last:
    last.save(5, noise(5), {}, {}, {})  # the end of a run that could not be saved is no success
  assert_same(Checkpoints(tmp_path).restore(noise(0)).state, noise(1))


def test_leftovers_of_interrupted_writes_are_ignored_then_cleared(run: pathlib.Path):
  leftover = run / "checkpoints" / "3.orbax-checkpoint-tmp"
  shutil.copytree(run / "checkpoints" / "2", leftover)
  checkpoints = Checkpoints(run)
  assert checkpoints.latest_step() == 2 and leftover.exists()
  assert checkpoints.save(3, make_state(3), DATA, CONFIG, {})
  checkpoints.close()
  assert steps(run) == (1, 2, 3) and not leftover.exists()


def test_a_subtree_is_read_alone_as_numpy(run: pathlib.Path, caplog: pytest.LogCaptureFixture):
  backbone = restore_params(run)
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(backbone))
  assert_same(backbone, make_state(2).teacher["backbone"])
  assert_same(restore_params(run, ("student",), step=1), make_state(1).student)
  with pytest.raises(Mismatch, match=r"holds no 'teacher/backbon': teacher/ has backbone, head"):
    restore_params(run, ("teacher", "backbon"))
  damage(run / "checkpoints" / "2", "truncated")
  with caplog.at_level(logging.WARNING):
    assert_same(restore_params(run), make_state(1).teacher["backbone"])
  assert "trying step 1" in caplog.text


def test_meta_says_what_a_step_is(two_steps: pathlib.Path):
  meta = read_meta(two_steps)
  assert meta["step"] == 2 and meta["config"] == CONFIG and meta["versions"]["jax"] == jax.__version__
  assert meta["manifest"]["teacher/backbone/norm/half"] == {"shape": [4, 3], "dtype": "bfloat16"}


def test_orbax_is_quiet(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
  with caplog.at_level(logging.INFO):
    save_steps(tmp_path, 1, 2)
    Checkpoints(tmp_path).restore(make_state())
  assert caplog.text == ""


WRITER = """
import sys
import jax.numpy as jnp
from vit_jax.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
last = checkpoints.latest_step() or 0
for step in range(last + 1, last + 1000):
  checkpoints.save(step, {"x": jnp.full((500_000,), step), "y": jnp.full((3,), -step)}, {"step": step}, {}, {})
  print(step - 1, flush=True)  # save waits for the one before it
"""


def test_a_kill_during_asynchronous_saves_loses_nothing_saved_before(tmp_path: pathlib.Path):
  chance = random.Random(0)
  confirmed = 0
  for _ in range(3):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for _ in range(chance.randint(2, 5)):
      confirmed = int(writer.stdout.readline())
    try:
      writer.wait(timeout=chance.uniform(0.0, 0.05))
    except subprocess.TimeoutExpired:
      writer.send_signal(signal.SIGKILL)
    confirmed = max([confirmed] + [int(line) for line in writer.stdout.read().split()])
    writer.wait()
    restored = Checkpoints(tmp_path).restore({"x": jnp.zeros((500_000,), jnp.int32), "y": jnp.zeros((3,), jnp.int32)})
    assert restored.step >= confirmed > 0
    assert restored.data_state == {"step": restored.step}
    assert (restored.state["x"] == restored.step).all() and (restored.state["y"] == -restored.step).all()


RESHARD = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from vit_jax.checkpoints import Checkpoints, restore_params
wide, square = jax.make_mesh((4,), ("data",)), jax.make_mesh((2, 2), ("data", "tensor"))
x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
key = jax.random.key(5)
def place(mesh, spec):
  return {"x": jax.device_put(x, NamedSharding(mesh, spec)), "key": jax.device_put(key, NamedSharding(mesh, P()))}
with Checkpoints(sys.argv[1]) as checkpoints:
  checkpoints.save(1, place(wide, P("data")), {}, {}, {})
target = place(square, P("data", "tensor"))
for abstract in (target, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), target)):
  restored = Checkpoints(sys.argv[1]).restore(abstract).state
  assert restored["x"].sharding == target["x"].sharding and (np.asarray(restored["x"]) == x).all()
  assert restored["key"].sharding.is_equivalent_to(target["key"].sharding, 0)
  assert (jax.random.key_data(restored["key"]) == jax.random.key_data(key)).all()
"""


def test_restores_onto_other_meshes_and_onto_one_device(tmp_path: pathlib.Path):
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(RESHARD), str(tmp_path)], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  expected = np.arange(32.0, dtype=np.float32).reshape(8, 4)
  restored = Checkpoints(tmp_path).restore({"x": jnp.zeros((8, 4)), "key": jax.random.key(0)}).state
  np.testing.assert_array_equal(np.asarray(restored["x"]), expected)
  np.testing.assert_array_equal(restore_params(tmp_path, ())["x"], expected)
