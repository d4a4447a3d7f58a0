"""The processes of a job: who they are, how they come together, what they agree on.

Where a process learns its place, the first that says so: flags, JAX_COORDINATOR_ADDRESS / JAX_NUM_PROCESSES /
JAX_PROCESS_ID, a Slurm step, Open MPI, Cloud TPU (GKE, then the metadata of the machine); otherwise it is alone.
Nothing here touches a device before the processes have met.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import logging
import os
import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax

from vit_jax.parallel import addresses, ending, jax_service, lifeline
from vit_jax.parallel.ending import JoinError
from vit_jax.parallel.lifeline import Lifeline

log = logging.getLogger(__name__)

SECRET = "VIT_JAX_JOB_SECRET"  # the variable of the job's secret
_SECRET_LENGTH = 16
JOIN_TIMEOUT = 300.0  # seconds: the machines of a job do not start at the same moment
_PORTS = range(61440, 65536)  # from which a job's number chooses, where the launcher names no port
_TPU_PORT = 8476
_THREADS = "16"  # on CPU, too few threads for collectives to wait in are a deadlock


@dataclasses.dataclass(frozen=True)
class Job:
  """What one process knows of its job before it has met the others.

  Attributes:
    coordinator: "host:port" of process 0; None for a process that is alone.
    num_processes: of the job.
    process_id: this one's, from 0.
    local_device_ids: the devices of this machine that are this process's; None: all, or its share of those that several
      processes see.
    source: where this is from, for people.
  """

  coordinator: str | None = None
  num_processes: int = 1
  process_id: int = 0
  local_device_ids: tuple[int, ...] | None = None
  source: str = "single process"


def find(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  local_device_ids: Sequence[int] | None = None,
  environ: Mapping[str, str] = os.environ,
) -> Job:
  """This process's place in its job. What one source leaves out is taken from the next.

  Raises:
    JoinError: if something is missing or impossible; says what to set.
  """
  flags = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  found: dict[str, Any] = {}
  sources = []
  for name, look in (("flags", lambda _: flags), *_SOURCES):
    if len(found) == len(flags):
      break
    told = {key: value for key, value in look(environ).items() if value is not None and key not in found}
    if told:
      found |= told
      sources.append(name)
  ids = local_device_ids if local_device_ids is not None else _numbers(environ, "JAX_LOCAL_DEVICE_IDS")
  ids = None if ids is None else tuple(ids)
  if not found or (found.get("num_processes") == 1 and not found.get("process_id")):
    return Job(local_device_ids=ids)
  missing = [key for key in flags if key not in found]
  if missing:
    raise JoinError(
      f"{', '.join(f'--{key}' for key in missing)}: not given, and no launcher says it (so far: "
      f"{', '.join(f'{key}={value}' for key, value in found.items())} from {' and '.join(sources)}). A job of several "
      "processes needs --coordinator=HOST:PORT (of process 0), --num_processes and --process_id."
    )
  host, _, port = found["coordinator"].rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise JoinError(f"--coordinator={found['coordinator']}: must be HOST:PORT of process 0, for example node1:9876.")
  if not 0 <= found["process_id"] < found["num_processes"]:
    raise JoinError(
      f"--process_id={found['process_id']}: must be one of 0 … {found['num_processes'] - 1}, as --num_processes="
      f"{found['num_processes']}."
    )
  return Job(**found, local_device_ids=ids, source=" and ".join(sources))


def _numbers(environ: Mapping[str, str], name: str) -> list[int] | None:
  """The value of a variable, "2" or "0,1"."""
  text = environ.get(name)
  if not text:
    return None
  try:
    return [int(part) for part in text.split(",")]
  except ValueError:
    raise JoinError(f"{name}={text}: is no number, or list of numbers such as 0,1.") from None


def _number(environ: Mapping[str, str], name: str) -> int | None:
  return next(iter(_numbers(environ, name) or ()), None)


def _from_jax(environ: Mapping[str, str]) -> dict[str, Any]:
  return {
    "coordinator": environ.get("JAX_COORDINATOR_ADDRESS"),
    "num_processes": _number(environ, "JAX_NUM_PROCESSES"),
    "process_id": _number(environ, "JAX_PROCESS_ID"),
  }


def _from_slurm(environ: Mapping[str, str]) -> dict[str, Any]:
  """A task of a Slurm step (`srun`); the batch script itself, or a shell in an allocation, is alone."""
  nodes, tasks = environ.get("SLURM_STEP_NODELIST"), _number(environ, "SLURM_STEP_NUM_TASKS")
  if not nodes or "SLURM_PROCID" not in environ or not tasks:
    return {}
  first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)  # the first of "n[001-004,7],m1"
  rest = re.match(r"[^\]]*\]([^,\[]*)", nodes[first.end() :])[1] if first[2] else ""
  return {
    "coordinator": f"{first[1]}{first[2] or ''}{rest}:{_port(_number(environ, 'SLURM_JOB_ID') or 0)}",
    "num_processes": tasks,
    "process_id": _number(environ, "SLURM_PROCID"),
  }


def _from_open_mpi(environ: Mapping[str, str]) -> dict[str, Any]:
  """A rank of `mpirun`, which must have started on the machine of rank 0 unless the coordinator is given."""
  found: dict[str, Any] = {
    "num_processes": _number(environ, "OMPI_COMM_WORLD_SIZE"),
    "process_id": _number(environ, "OMPI_COMM_WORLD_RANK"),
  }
  launcher = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]]+?)[,\]:]", environ.get("OMPI_MCA_orte_hnp_uri", ""))
  if launcher:
    address = f"[{launcher[2]}]" if ":" in launcher[2] else launcher[2]
    found["coordinator"] = f"{address}:{_port(int(launcher[1]) >> 12)}"  # job numbers are multiples of 2^12
  return found


def _from_tpu(environ: Mapping[str, str]) -> dict[str, Any]:
  """A host of a TPU slice, or of several: as the variables that GKE sets say, or else the machine's metadata."""
  known = dict(environ)
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  worker = _number(environ, "TPU_WORKER_ID")
  if hosts is None and _on_tpu_machine(environ):
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    hosts, number = _metadata(server, "worker-network-endpoints"), _metadata(server, "agent-worker-number")
    worker = int(number) if number else None
    lines = (line.split(":", 1) for line in (_metadata(server, "tpu-env") or "").splitlines() if ":" in line)
    known = {key.strip(): value.strip().strip("'") for key, value in lines} | known
  if not hosts or worker is None:
    return {}
  names = [part.split(":")[2] if part.count(":") == 2 else part.split(":")[0] for part in hosts.split(",")]
  slices, number = _number(known, "MEGASCALE_NUM_SLICES") or 1, _number(known, "MEGASCALE_SLICE_ID") or 0
  first = (known.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
  return {
    "coordinator": f"{first}:{_TPU_PORT}",
    "num_processes": len(names) * slices,
    "process_id": worker + number * len(names),
  }


_SOURCES: tuple[tuple[str, Callable[[Mapping[str, str]], dict[str, Any]]], ...] = (
  ("environment", _from_jax),
  ("Slurm", _from_slurm),
  ("Open MPI", _from_open_mpi),
  ("Cloud TPU", _from_tpu),
)


def _port(job: int) -> int:
  return _PORTS[job % len(_PORTS)]


def _on_tpu_machine(environ: Mapping[str, str]) -> bool:
  devices = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(devices) and "TPU_SKIP_MDS_QUERY" not in environ and importlib.util.find_spec("libtpu") is not None


def _metadata(server: str, key: str) -> str | None:
  """An attribute of this machine, as the cloud's own server tells it; None where there is none."""
  address = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
  request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=5) as response:
      return response.read().decode()
  except (urllib.error.URLError, OSError):
    return None


_current: Lifeline | None = None
_job = Job()


def current() -> Lifeline | None:
  """The connection to the other processes; None in a process that is alone."""
  return _current


def join(job: Job, *, timeout: float = JOIN_TIMEOUT) -> Lifeline | None:
  """Meets the other processes and starts JAX as one of them. Comes before anything that uses a device.

  Args:
    job: this process's place.
    timeout: seconds to wait for the others.

  Returns:
    The connection to the others, which is also `current()`; None for a process that is alone.

  Raises:
    JoinError: naming the coordinator and the processes that did not come.
  """
  global _current, _job
  if job.num_processes == 1:
    if job.local_device_ids is not None:
      _use_devices(job.local_device_ids)
    return None
  secret = _secret(os.environ)
  if not secret and job.process_id == 0:
    _warn_of_strangers(job)
  _current = lifeline.join(
    job.coordinator,
    job.process_id,
    job.num_processes,
    timeout=timeout,
    host=socket.gethostname(),
    about={
      "machine": jax_service.machine(),
      "gpus": _visible_gpus(os.environ) if job.local_device_ids is None else None,
    },
    prepare=lambda everyone: _answers(job.coordinator, everyone),
    secret=secret,
  )
  _job = job
  ids = job.local_device_ids if job.local_device_ids is not None else _current.about["devices"]
  os.environ.setdefault("NPROC", _THREADS)
  # SIGTERM is ours: the training loop saves and ends. JAX's own service would swallow it.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    _current.about["jax"],
    job.num_processes,
    job.process_id,
    local_device_ids=None if ids is None else list(ids),
    cluster_detection_method="deactivate",
    coordinator_bind_address=_current.about["bind"],
  )
  if jax_service.is_private(_current.about["jax"]):
    _current.meet("the start of JAX")  # all are connected
    if job.process_id == 0:
      jax_service.close_door(_current.about["jax"])
  return _current


def _secret(environ: Mapping[str, str]) -> bytes:
  """What the processes of the job know and nobody else; empty if they were given nothing."""
  secret = environ.get(SECRET, "").strip()
  if secret and len(secret) < _SECRET_LENGTH:
    raise JoinError(
      f"{SECRET} has {len(secret)} characters: so few can be guessed. It must have {_SECRET_LENGTH} or more, for "
      "example those of `openssl rand -hex 32`."
    )
  return secret.encode(errors="surrogateescape")


def _warn_of_strangers(job: Job) -> None:
  host, port = addresses.split(job.coordinator)
  who = "any user of this machine" if addresses.is_loopback(host) else f"whoever reaches port {port} of {host}"
  log.warning(
    "%s is not set: %s can take part in this job, or stop it. Set it for all processes to the same random text, for "
    "example of `openssl rand -hex 32`; the scripts in launch/ do.", SECRET, who,
  )  # fmt: skip


def _use_devices(ids: Sequence[int]) -> None:
  for platform in ("cuda", "rocm"):
    jax.config.update(f"jax_{platform}_visible_devices", ",".join(map(str, ids)))


def _answers(coordinator: str, everyone: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """What the roll call tells each process: where JAX's service is, and which devices are its own."""
  for process in everyone:
    gpus = process.get("gpus")
    if not (gpus is None or (isinstance(gpus, list) and all(isinstance(name, str) for name in gpus))):
      raise JoinError(f"a process on {process['host']} speaks of its GPUs in another way: another version?")
  shares = divide_gpus(everyone)
  places = jax_service.places(coordinator, everyone)
  return [{**place, "devices": ids} for place, ids in zip(places, shares, strict=True)]


def divide_gpus(everyone: Sequence[Mapping[str, Any]]) -> list[list[int] | None]:
  """The GPUs of each process: all that it sees, or an equal part where several processes see the same ones.

  Args:
    everyone: the processes in order, each with "host" and "gpus", the names of the GPUs that it sees (None: it was told
      which to use).

  Raises:
    JoinError: if GPUs cannot be divided.
  """
  shares: list[list[int] | None] = [None] * len(everyone)
  together = defaultdict(list)
  for number, process in enumerate(everyone):
    if process["gpus"]:
      together[process["host"], tuple(process["gpus"])].append(number)
  for (host, gpus), numbers in together.items():
    if len(numbers) == 1:
      continue
    each, left = divmod(len(gpus), len(numbers))
    if left or not each:
      raise JoinError(
        f"{len(numbers)} processes on {host} see the same {len(gpus)} GPU(s), which cannot be divided evenly: start "
        "one process a machine or one a GPU, or tell each its own with --local_device_ids."
      )
    for place, number in enumerate(numbers):
      shares[number] = list(range(place * each, (place + 1) * each))
  return shares


def _visible_gpus(environ: Mapping[str, str]) -> list[str]:
  """Names of the NVIDIA GPUs that this process may use, as no other GPU of the machine has them."""
  platforms = environ.get("JAX_PLATFORMS") or jax.config.jax_platforms or "cuda"
  if not {"cuda", "gpu"} & set(platforms.split(",")):
    return []
  try:
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
  except (OSError, subprocess.SubprocessError):
    return []
  chosen = environ.get("CUDA_VISIBLE_DEVICES")
  if chosen is None:
    return found
  names = [name.strip() for name in chosen.split(",") if name.strip()]
  return [found[int(name)] if name.isdecimal() and int(name) < len(found) else name for name in names]


class Agreement:
  """A step at which all processes do something together, asked for by any of them at any time.

      stop = Agreement("stop")
      signal.signal(SIGTERM, lambda *_: stop.ask())
      for step in ...:
        ...
        if stop.due(step):  # on all processes at the same step, soon after somebody asked
          ...

  Args:
    what: its name, the same on all processes.
  """

  def __init__(self, what: str):
    self._what = what
    self._asked = False

  def ask(self) -> None:
    """May be called from a signal handler, and again."""
    if _current is None:
      self._asked = True
    else:
      _current.ask(self._what)

  def due(self, step: int) -> bool:
    """Whether now is the time. All processes must call it, for every step in turn."""
    if _current is not None:
      return _current.due(self._what, step)
    asked, self._asked = self._asked, False
    return asked


def check_same(what: str, value: str) -> None:
  """Ends the job unless this is the same on all processes, saying who has what."""
  if _current is not None:
    _current.check_same(what, value)


def meet(what: str) -> None:
  """Returns when all processes are here, which all reach at the same place of the program: `what`, for people."""
  if _current is not None:
    _current.meet(what)


def compile_together(what: str, jitted: Any, *args: Any) -> None:
  """Compiles a `jax.jit` function for these arguments on all processes before any of them runs it.

  A collective waits only half a minute for a process that still compiles. With one process nothing is done.

  Args:
    what: the function, for people.
    jitted: the function.
    *args: its arguments, or their shapes.
  """
  if _current is not None:
    jitted.lower(*args).compile()  # the call that follows finds it
    _current.meet(what)


def end(text: str, code: int) -> NoReturn:
  """Ends all processes of the job with this exit code, at once, saying why."""
  if _current is not None:
    _current.fail(text, code, others=code)
  os._exit(code)


def describe() -> str:
  """The processes in one line, for people."""
  if _current is None:
    return "1"
  hosts: dict[str, list[int]] = defaultdict(list)
  for number, host in enumerate(_current.hosts):
    hosts[host].append(number)
  placed = "; ".join(f"{ending.ranges(numbers)} on {host}" for host, numbers in hosts.items())
  return f"{_job.num_processes} from {_job.source}, coordinator {_job.coordinator}: {placed}"


# What of the environment decides how a job runs, by the beginning of the name.
_TELLING = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "MEGASCALE_", "CUDA_", "NVIDIA_VISIBLE", "NCCL_", "GLOO_", "NPROC",
            "OMP_", "SLURM_JOB_", "SLURM_STEP_", "SLURM_PROCID", "SLURM_RESTART", "OMPI_COMM_WORLD_")  # fmt: skip


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
  """The variables of the environment that bear on how the job runs."""
  return {name: environ[name] for name in sorted(environ) if name.startswith(_TELLING)}
