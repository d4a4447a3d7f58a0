"""A long run of the pipeline on faulty data that is killed fifty times: every record once an epoch, memory flat."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data import pictures
from vit_jax.data.array_records import write_array_record
from vit_jax.data.order import ShuffledOrder

RECORDS, BAD, KILLS, BATCH, SEED = 200_000, 2_000, 50, 500, 11
EPOCH = RECORDS // BATCH  # batches; the first is killed again and again, the second runs through
SAVED = 4  # batches from one saved state to the next

# Appends each batch (its number, then its labels) to a log, and its memory in KiB to another, as a run saves its state.
CHILD = f"""
import json, os, sys
import numpy as np
from vit_jax.data.pipeline import make_pipeline
from vit_jax.data.sources import open_source
from vit_jax.data.views import Views

folder, last = sys.argv[1], int(sys.argv[2])
source = open_source(f"array_record:{{folder}}/*.array_record")
views = Views(
  global_size=8, local_size=8, local_number=0, mask_grid=(2, 2), loss_group_size=50, jitter=0.0, grayscale=0.0,
  blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0),
)
with make_pipeline(
  source, views, batch_size={BATCH}, seed={SEED}, workers=0, timeout=60.0,
  bad_records=f"{{folder}}/bad_records.jsonl", max_bad_fraction=0.03,
) as pipeline, open(f"{{folder}}/labels.bin", "ab") as labels, open(f"{{folder}}/memory.txt", "a") as memory:
  if os.path.exists(f"{{folder}}/state.json"):
    pipeline.set_state(json.load(open(f"{{folder}}/state.json")))
  while (number := pipeline.get_state()["next_batch"]) < last:
    labels.write(np.concatenate([[number], next(pipeline)["label"]]).astype(np.int32).tobytes())
    labels.flush()
    if number % {SAVED} == 0:
      with open(f"{{folder}}/state.part", "w") as file:
        json.dump(pipeline.get_state(), file)
      os.replace(f"{{folder}}/state.part", f"{{folder}}/state.json")
    status = open("/proc/self/status").read()
    memory.write(f"{{os.getpid()}} {{number}} {{status.split('VmRSS:')[1].split()[0]}}\\n")
    memory.flush()
"""


def run(folder, last):
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
  return subprocess.Popen(
    [sys.executable, "-c", CHILD, str(folder), str(last)], env=environment, stderr=subprocess.DEVNULL
  )


def logged(folder):
  """Rows [batch, labels...], as many as are complete."""
  path = folder / "labels.bin"
  data = np.fromfile(path, np.int32) if path.exists() else np.empty(0, np.int32)
  return data[: len(data) // (BATCH + 1) * (BATCH + 1)].reshape(-1, BATCH + 1)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory of a process from /proc")
def test_every_record_comes_once_an_epoch_across_kills_and_faults_in_flat_memory(tmp_path):
  rng = np.random.default_rng(0)
  images = [pictures.encoded(pictures.smooth(8, 8, i), "PNG") for i in range(64)]
  faults = [b"", images[0][:40], b"this is no picture", pictures.encoded(pictures.smooth(1, 1), "PNG")]
  bad = set(rng.choice(RECORDS, BAD, replace=False).tolist())
  rows = ((faults[i % 4] if i in bad else images[i % 64], i, f"r{i}") for i in range(RECORDS))
  write_array_record(tmp_path / "a.array_record", rows)

  begun, kills = time.monotonic(), 0
  for target in np.sort(rng.choice(np.arange(1, EPOCH), KILLS, replace=False)):
    process = run(tmp_path, EPOCH)
    while process.poll() is None and (not len(log := logged(tmp_path)) or log[:, 0].max() < target):
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kills += 1
    torn = tmp_path / "labels.bin"  # a batch that was cut off as it was written is made again
    os.truncate(torn, torn.stat().st_size // (4 * (BATCH + 1)) * (4 * (BATCH + 1)))
  for last in (EPOCH, 2 * EPOCH):
    assert run(tmp_path, last).wait() == 0
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
    f"\n{len(log) * BATCH:,} records delivered in {seconds:.0f} s, {kills} kills, {len(log) - 2 * EPOCH} batches made "
    f"again; memory: peak {memory[:, 2].max() / 1024:.0f} MiB, from {early:.1f} to {late:.1f} MiB over an epoch"
  )
  assert late - early < 0.05 * early
