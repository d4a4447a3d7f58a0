"""Whole runs on several processes: the same mathematics, one voice, and an end for all when one fails or is to stop."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from tests.parallel import attackers
from tests.parallel.members import free_address
from tests.train.jobs import ROOT, environment, losses, overrides, reads_that_hang, started
from vit_jax import config as configs
from vit_jax.checkpoints import read_meta, steps
from vit_jax.parallel import addresses
from vit_jax.parallel.processes import SECRET
from vit_jax.train.interrupts import RESUMABLE
from vit_jax.train.loop import train

PATIENCE = 60  # seconds in which a job ends that cannot go on


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
  """A run of two processes: one is asked to stop, the same command goes on, one is killed."""
  folder = tmp_path_factory.mktemp("two")
  workdir = folder / "two"
  flags = overrides(duration="60 steps")
  with started(folder, workdir, 2, *flags) as job:
    job.wait_until(lambda: len(losses(workdir)) >= 3)
    job.signal(1, signal.SIGTERM)
    stopped = job.wait(), job.output
  saved = steps(workdir)
  with started(folder, workdir, 2, *flags) as job:
    job.wait_until(lambda: max(losses(workdir)) >= saved[-1] + 3)
    since = job.signal(1, signal.SIGKILL)
    killed = job.wait(PATIENCE), job.output[len(stopped[1]) :]
  return workdir, saved, stopped, (*killed, time.monotonic() - since)


def test_a_stop_asked_of_one_process_saves_and_ends_all_of_them(interrupted):
  _, saved, (code, output), _ = interrupted
  assert code == RESUMABLE
  assert len(saved) == 1 and 3 <= saved[0] < 57, output
  assert "SIGTERM" in output and f"Stopped at step {saved[0]} of 60" in output


def test_the_run_goes_on_where_all_stopped(interrupted):
  workdir, saved, _, (_, output, _) = interrupted
  assert f"Going on from step {saved[0]} of 60." in output
  assert sorted(losses(workdir)) == list(range(1, max(losses(workdir)) + 1))


def test_a_killed_process_ends_the_job_and_is_named(interrupted):
  code, output, seconds = interrupted[3]
  assert code != 0 and seconds < PATIENCE
  assert "[0] vit-jax: process 0 of 2" in output
  assert "stopping: process 1 of 2" in output and "ended without a word: killed" in output


def test_only_the_first_process_speaks_and_writes(interrupted):
  output = interrupted[3][1]
  assert "[0] step" in output and "[1] step" not in output
  lines = [json.loads(line)["step"] for line in (interrupted[0] / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == len(set(lines))


def test_two_processes_give_the_losses_of_one(interrupted, tmp_path, monkeypatch):
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: devices)
  train(configs.load("configs/tiny.py", overrides(duration="60 steps")), str(tmp_path))
  ours, expected = losses(interrupted[0]), losses(tmp_path)
  np.testing.assert_allclose(list(ours.values()), [expected[step] for step in ours], rtol=1e-4)


def run_one(tmp_path, *flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "vit_jax", "train", "--config=configs/tiny.py", f"--workdir={tmp_path}/run"]
  return subprocess.run(
    [*command, *overrides(), *flags], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=600
  )


def test_who_does_not_come_is_named_before_anything_is_compiled(tmp_path):
  done = run_one(
    tmp_path, "--coordinator=127.0.0.1:29876", "--num_processes=3", "--process_id=0", "--join_timeout=1", "--dry_run"
  )
  assert done.returncode == 2
  assert "only 1 of 3 processes came to the coordinator 127.0.0.1:29876" in done.stderr
  assert "Missing: process 1-2" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_job_that_strangers_attack_from_its_beginning_to_its_end_is_the_same_bit_by_bit(tmp_path):
  secret, address = "a secret of these two processes", free_address()
  host, port = addresses.split(address)
  flags = overrides(duration="120 steps")
  command = [sys.executable, "-m", "vit_jax", "train", "--config=configs/tiny.py", f"--workdir={tmp_path}/attacked"]
  place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", SECRET: secret, "PYTHONUNBUFFERED": "1"}
  kept, believed = [], []
  with contextlib.ExitStack() as stack:
    log = stack.enter_context(open(tmp_path / "log", "w+"))

    def start(number: int) -> subprocess.Popen:
      environ = environment(tmp_path) | place | {"JAX_PROCESS_ID": str(number)}
      process = subprocess.Popen([*command, *flags], cwd=ROOT, env=environ, stdout=log, stderr=log)
      stack.callback(process.kill)
      return process

    def said() -> str:
      return (tmp_path / "log").read_text()

    first = start(0)
    until = time.monotonic() + PATIENCE
    while (host, port) not in attackers.listening(first.pid):
      assert first.poll() is None and time.monotonic() < until, said()
      time.sleep(0.1)
    assert attackers.listening(first.pid) == [(host, port)]  # the loopback's, and nothing else
    limits = resource.prlimit(first.pid, resource.RLIMIT_NOFILE)
    scarce = len(os.listdir(f"/proc/{first.pid}/fd")) + 20
    resource.prlimit(first.pid, resource.RLIMIT_NOFILE, (scarce, limits[1]))
    for attack in attackers.ATTACKS.values():
      kept += attack((host, port))
    kept += attackers.replayed_hello((host, port), secret.encode())
    believed.append(attackers.forged_jax_client((host, port)))
    resource.prlimit(first.pid, resource.RLIMIT_NOFILE, limits)
    second = start(1)
    attacked = set()
    while first.poll() is None and second.poll() is None:
      for target in {*attackers.listening(first.pid), *attackers.listening(second.pid)} - {(host, port)} - attacked:
        if losses(tmp_path / "attacked"):  # the processes' own connections are made
          with contextlib.suppress(ConnectionRefusedError):  # at its end
            kept += attackers.random_bytes(target)
            believed.append(attackers.forged_jax_client(target))
            attacked.add(target)
      with contextlib.suppress(ConnectionRefusedError):
        kept.append(attackers.connect((host, port)))
      time.sleep(0.2)
    assert (first.wait(PATIENCE), second.wait(PATIENCE)) == (0, 0), said()
    output = said()
  assert attacked and not any(believed)
  assert "could not be accepted (Too many open files)" in output and "did not know the job's secret" in output
  assert "\x1b" not in output and "\u202e" not in output and "Traceback" not in output
  with started(tmp_path, tmp_path / "quiet", 2, *flags) as job:
    assert job.wait() == 0, job.output
  assert losses(tmp_path / "attacked") == losses(tmp_path / "quiet")
  prints = [read_meta(tmp_path / name)["fingerprints"] for name in ("attacked", "quiet")]
  assert prints[0] == prints[1] and len(prints[0]) > 10


@pytest.mark.slow
def test_a_dry_run_shows_the_job(tmp_path):
  with started(tmp_path, tmp_path / "dry", 2, *overrides(), "--dry_run", JAX_NUM_CPU_DEVICES="2") as job:
    assert job.wait() == 0, job.output
  for part in ("2 from environment, coordinator 127.0.0.1", "4 cpu as data 4", "4 images of a batch (rows 0-3) for 2"):
    assert part in job.output
  assert "JAX_NUM_PROCESSES=2" in job.output and "[1] " not in job.output
  assert not (tmp_path / "dry").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("processes", "devices", "mesh"),
  [
    (4, 1, {"mesh__data": 4}),
    (2, 2, {"mesh__data": 1, "mesh__fsdp": 4}),
    (2, 1, {"mesh__data": 1, "mesh__tensor": 2}),
    (4, 1, {"mesh__data": 2, "mesh__tensor": 2}),
  ],
)
def test_any_number_of_processes_and_any_mesh_give_the_same_losses(processes, devices, mesh, tmp_path, monkeypatch):
  flags = overrides(**mesh, log__pictures="True", evaluation__every="50 %")
  with started(tmp_path, tmp_path / "several", processes, *flags, JAX_NUM_CPU_DEVICES=str(devices)) as job:
    assert job.wait() == 0, job.output
  alone = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *_: alone)
  train(configs.load("configs/tiny.py", overrides()), str(tmp_path / "one"))
  ours, expected = losses(tmp_path / "several"), losses(tmp_path / "one")
  np.testing.assert_allclose([ours[step] for step in expected], list(expected.values()), rtol=1e-4)
  assert {path.name for path in (tmp_path / "several" / "pictures").glob("pca*")} >= {"pca_0000012.png"}
  assert (tmp_path / "several" / "summary.md").exists()


@pytest.mark.slow
def test_an_exception_on_one_process_is_told_by_the_others(tmp_path):
  flags = overrides(data__source="folder:photos", evaluation__every="0 steps")
  with started(tmp_path, tmp_path / "run", 2, *flags) as job:
    assert job.wait(PATIENCE) != 0
  assert "failed: data.source" in job.output or "failed: " in job.output


@pytest.mark.slow
def test_evaluate_on_two_processes_gives_the_scores_of_one(interrupted, tmp_path):
  flags = ["evaluate", f"--model={interrupted[0]}", "--data=embedded:textures?size=16&count=64", "--tasks=knn,linear"]
  scores = []
  for processes in (1, 2):
    file = tmp_path / f"{processes}.json"
    done = subprocess.run(
      ["launch/local.sh", str(processes), *flags, f"--json={file}"],
      cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    scores.append(json.loads(file.read_text()))
  assert (
    scores[0]["results"] == pytest.approx(scores[1]["results"]) if "results" in scores[0] else scores[0] == scores[1]
  )


@pytest.mark.slow
def test_an_evaluation_of_two_processes_is_given_up_by_both_and_leaves_no_trace(tmp_path):
  flags = overrides(duration="6 steps", evaluation__every="3 steps", evaluation__max_examples=6000)
  workdir, whole = tmp_path / "stopped", tmp_path / "whole"
  with started(tmp_path, workdir, 2, *flags) as job:
    job.wait_until(lambda: 3 in losses(workdir))
    since = job.signal(1, signal.SIGTERM)
    assert job.wait(PATIENCE) == RESUMABLE, job.output
    assert "Stopped at step 3 of 6; its evaluation was given up" in job.output, job.output
    assert time.monotonic() - since < PATIENCE
  for folder in (workdir, whole):
    with started(tmp_path, folder, 2, *flags) as job:
      assert job.wait() == 0, job.output
  assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  assert steps(workdir)[-1] == 6


@pytest.mark.slow
def test_a_job_of_two_processes_whose_data_stall_ends_when_it_is_asked_to(tmp_path):
  """The state between two steps of several processes cannot be saved; the checkpoint before is what goes on."""
  photos, workdir = tmp_path / "photos", tmp_path / "stalled"
  photos.mkdir()
  for i in range(40):
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)).save(photos / f"{i:02}.png")
  flags = overrides(data__source=f"folder:{photos}", duration="1000 steps", checkpoint__every="1 steps")
  variables, flag = reads_that_hang(tmp_path)
  with started(tmp_path, workdir, 2, *flags, **variables) as job:
    job.wait_until(lambda: 3 in losses(workdir))
    flag.touch()
    time.sleep(5)
    job.signal(1, signal.SIGTERM)
    assert job.wait(2 * PATIENCE) == RESUMABLE, job.output
  assert "no step has ended for" in job.output and steps(workdir)
