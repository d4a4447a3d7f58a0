"""A Slurm of two nodes on this machine, for as long as a `with` lasts. Needs root and Debian's Slurm and MUNGE."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged", "mungekey")


def install() -> str | None:
  """Installs what is missing; returns why it cannot."""
  if all(map(shutil.which, PROGRAMS)):
    return None
  if os.geteuid() != 0 or not shutil.which("apt-get"):
    return "needs Slurm, or root on a Debian to install it"
  for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
    done = subprocess.run(
      ["apt-get", "-q", *command],
      capture_output=True,
      text=True,
      env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
    )
    if done.returncode:
      return f"apt-get {command[0]} failed: {done.stderr[-300:]}"
  return None


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
  """Starts the daemons and gives the environment in which `sbatch` and the others speak to them."""
  with contextlib.ExitStack() as stack:
    socket_file = _start_munge(folder, stack)
    configuration = folder / "slurm.conf"
    configuration.write_text(_configuration(folder, socket_file))
    environ = os.environ | {"SLURM_CONF": str(configuration)}
    for name in ("state", "spool"):
      (folder / name).mkdir()
    _start(["slurmctld", "-D"], folder / "slurmctld.log", environ, stack)
    for node in _nodes():
      _start(["slurmd", "-D", "-N", node], folder / f"{node}.log", environ, stack)
    _wait_for(lambda: _output(["sinfo", "-h", "-o", "%T %D"], environ) == "idle 2", folder, "two idle nodes")
    yield environ


def _start_munge(folder: Path, stack: contextlib.ExitStack) -> Path:
  """A MUNGE of its own, with a key of its own."""
  place = folder / "munge"
  place.mkdir(mode=0o711)
  key, socket_file = place / "key", place / "socket"
  subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
  command = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_file}"]
  command += [f"--pid-file={place}/pid", f"--log-file={place}/log", f"--seed-file={place}/seed"]
  _start(command, place / "out", dict(os.environ), stack)
  _wait_for(socket_file.exists, place, "munge")
  return socket_file


def _configuration(folder: Path, socket_file: Path) -> str:
  host = socket.gethostname()
  control, *ports = _free_ports(3)
  nodes = _nodes()
  lines = [
    "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={control}", "SlurmUser=root",
    "AuthType=auth/munge", "CredType=cred/munge", f"AuthInfo=socket={socket_file}", "MpiDefault=none",
    "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "ReturnToService=2", "SchedulerType=sched/backfill",
    "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core", "JobAcctGatherType=jobacct_gather/none",
    f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool/%n", f"SlurmdPidFile={folder}/%n.pid",
    f"SlurmctldPidFile={folder}/slurmctld.pid", "KillWait=20", "InactiveLimit=0", "SwitchType=switch/none",
    *(
      f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000 State=UNKNOWN"
      for node, port in zip(nodes, ports, strict=True)
    ),
    f"PartitionName=all Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP",
  ]  # fmt: skip
  return "\n".join(lines) + "\n"


def _nodes() -> tuple[str, str]:
  """The first has the name of the machine, so that the processes find it."""
  return socket.gethostname(), f"{socket.gethostname()}x"


def _free_ports(number: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    probes = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(number)]
    for probe in probes:
      probe.bind(("127.0.0.1", 0))
    return [probe.getsockname()[1] for probe in probes]


def _start(command: list[str], output: Path, environ: dict[str, str], stack: contextlib.ExitStack) -> None:
  program = shutil.which(command[0]) or f"/usr/sbin/{command[0]}"
  log = stack.enter_context(open(output, "w"))  # noqa: SIM115
  process = subprocess.Popen([program, *command[1:]], stdout=log, stderr=log, env=environ, start_new_session=True)

  def stop() -> None:
    process.send_signal(signal.SIGTERM)
    try:
      process.wait(20)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()

  stack.callback(stop)


def _output(command: list[str], environ: dict[str, str]) -> str:
  return subprocess.run(command, capture_output=True, text=True, env=environ).stdout.strip()


def _wait_for(condition, folder: Path, what: str) -> None:
  until = time.monotonic() + 60
  while not condition():
    if time.monotonic() > until:
      logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log")))
      raise TimeoutError(f"no {what} after a minute\n{logs}")
    time.sleep(0.2)
