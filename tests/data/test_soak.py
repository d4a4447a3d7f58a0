"""A long run of the pipeline on faulty data that is killed fifty times: every record once an epoch, memory flat."""

import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data import pictures
from vit_jax.data.order import ShuffledOrder
from vit_jax.data.pipeline import make_pipeline
from vit_jax.data.views import MultiCrop

RECORDS, BAD, KILLS, BATCH, SEED = 200_000, 2_000, 50, 500, 11
EPOCH = RECORDS // BATCH  # batches; the first is killed again and again, the second runs through
SAVED = 4  # batches from one saved state to the next

VIEWS = MultiCrop(
  global_size=8, local_size=8, local_number=0, mask_grid=(2, 2), loss_group_size=50, jitter=0.0, grayscale=0.0,
  blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0),
)  # fmt: skip


class Records:
  """Record i is a small encoded picture with label i; some cannot be read, in one of several ways."""

  num_classes, class_names = 0, ()

  def __init__(self):
    self.bad = set(np.random.default_rng(0).choice(RECORDS, BAD, replace=False).tolist())
    self._images = [pictures.encoded(pictures.smooth(8, 8, i), "PNG") for i in range(64)]
    self._faults = [b"", self._images[0][:40], b"this is no picture", pictures.encoded(pictures.smooth(1, 1), "PNG")]

  def __len__(self) -> int:
    return RECORDS

  def __getitem__(self, index: int) -> dict[str, bytes | int]:
    if index in self.bad and index % 5 == 4:
      raise FileNotFoundError(2, "No such file or directory")
    return {"image": self._faults[index % 5] if index in self.bad else self._images[index % 64], "label": index}

  def describe(self, index: int) -> str:
    return f"record {index}"


def deliver(folder: str, last: int, workers: int) -> None:
  """A process of the run: logs each batch (its number, then its labels) and its memory in KiB, saves its state."""
  logging.getLogger("vit_jax").setLevel(logging.ERROR)
  options = {"timeout": 60.0, "bad_records": f"{folder}/bad_records.jsonl", "max_bad_fraction": 0.03}
  with (
    make_pipeline(Records(), VIEWS, batch_size=BATCH, seed=SEED, workers=workers, **options) as pipeline,
    open(f"{folder}/labels.bin", "ab") as labels,
    open(f"{folder}/memory.txt", "a") as memory,
  ):
    if os.path.exists(f"{folder}/state.json"):
      pipeline.set_state(json.loads(Path(f"{folder}/state.json").read_text()))
    while (number := pipeline.get_state()["next_batch"]) < last:
      labels.write(np.concatenate([[number], next(pipeline)["label"]]).astype(np.int32).tobytes())
      labels.flush()
      if number % SAVED == 0:
        Path(f"{folder}/state.part").write_text(json.dumps(pipeline.get_state()))
        os.replace(f"{folder}/state.part", f"{folder}/state.json")
      status = Path("/proc/self/status").read_text()
      memory.write(f"{os.getpid()} {number} {status.split('VmRSS:')[1].split()[0]}\n")
      memory.flush()


def run(folder: Path, last: int, workers: int) -> multiprocessing.Process:
  """Starts a process of the run, forked from one that has only imported the package: fifty starts cost no minutes."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tests.data.test_soak"])
  process = context.Process(target=deliver, args=(str(folder), last, workers))
  process.start()
  return process


def logged(folder):
  """Rows [batch, labels...], as many as are complete."""
  path = folder / "labels.bin"
  data = np.fromfile(path, np.int32) if path.exists() else np.empty(0, np.int32)
  return data[: len(data) // (BATCH + 1) * (BATCH + 1)].reshape(-1, BATCH + 1)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_every_record_comes_once_an_epoch_across_kills_and_faults_in_flat_memory(tmp_path, workers):
  rng, bad = np.random.default_rng(1), Records().bad
  begun, kills = time.monotonic(), 0
  for target in np.sort(rng.choice(np.arange(1, EPOCH), KILLS, replace=False)):
    process = run(tmp_path, EPOCH, workers)
    while process.is_alive() and (not len(log := logged(tmp_path)) or log[:, 0].max() < target):
      time.sleep(0.01)
    process.kill()
    process.join()
    kills += 1
    torn = tmp_path / "labels.bin"  # a batch that was cut off as it was written is made again
    os.truncate(torn, torn.stat().st_size // (4 * (BATCH + 1)) * (4 * (BATCH + 1)))
  for last in (EPOCH, 2 * EPOCH):
    process = run(tmp_path, last, workers)
    process.join()
    assert process.exitcode == 0
  seconds = time.monotonic() - begun

  log = logged(tmp_path)
  batches = {}
  for number, *labels in log.tolist():
    assert batches.setdefault(number, labels) == labels, f"batch {number} came out differently after a kill"
  assert sorted(batches) == list(range(2 * EPOCH))
  labels = np.array([batches[number] for number in range(2 * EPOCH)]).reshape(2, RECORDS)
  meant = ShuffledOrder(RECORDS, SEED)(np.arange(2 * RECORDS)).reshape(2, RECORDS)
  is_bad = np.isin(meant, list(bad))
  for epoch in range(2):
    assert np.array_equal(np.sort(meant[epoch]), np.arange(RECORDS))  # every record once …
  assert np.array_equal(labels[~is_bad], meant[~is_bad])  # … each in its place …
  assert not np.isin(labels[is_bad], list(bad)).any()  # … and another in the place of a bad one
  entries = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
  assert sorted(entry["record"] for entry in entries) == sorted(bad)  # each named, once

  memory = np.loadtxt(tmp_path / "memory.txt", dtype=np.int64)  # [lines, (process, batch, KiB)]
  whole = memory[memory[:, 0] == memory[-1, 0]][:, 2] / 1024  # MiB, of the epoch that ran through
  early, late = np.median(whole[EPOCH // 10 : EPOCH // 5]), np.median(whole[-EPOCH // 10 :])
  print(
    f"\n{workers} workers: {len(log) * BATCH:,} records delivered in {seconds:.0f} s, {kills} kills, "
    f"{len(log) - 2 * EPOCH} batches made again; memory: peak {memory[:, 2].max() / 1024:.0f} MiB, from {early:.1f} to "
    f"{late:.1f} MiB over an epoch"
  )
  assert late - early < 0.05 * early
