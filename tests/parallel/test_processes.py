"""Where a process learns its place in a job, and how GPUs are shared out."""

from __future__ import annotations

import http.server
import threading

import pytest

from vit_jax.parallel import JoinError, processes
from vit_jax.parallel.processes import Job, divide_gpus, find

SLURM = {
  "SLURM_JOB_ID": "70",
  "SLURM_STEP_NODELIST": "gpu[007-009,12]",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_PROCID": "2",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "3",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
GKE = {"TPU_WORKER_HOSTNAMES": "w-0.net,w-1.net", "TPU_WORKER_ID": "1"}


def test_without_any_source_a_process_is_alone():
  assert find(environ={}) == Job()


@pytest.mark.parametrize(
  ("environ", "expected"),
  [
    (JAX, Job("a:1", 2, 1, None, "environment")),
    (SLURM, Job("gpu007:61510", 4, 2, None, "Slurm")),
    (SLURM | {"SLURM_STEP_NODELIST": "n1,n2"}, Job("n1:61510", 4, 2, None, "Slurm")),
    (SLURM | {"SLURM_STEP_NODELIST": "r[01-02]-gpu,m3"}, Job("r01-gpu:61510", 4, 2, None, "Slurm")),
    (OPEN_MPI, Job("10.96.0.1:62624", 3, 1, None, "Open MPI")),
    (GKE, Job("w-0.net:8476", 2, 1, None, "Cloud TPU")),
    (
      GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s-0.net:8080"},
      Job("s-0.net:8476", 4, 3, None, "Cloud TPU"),
    ),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Job()),
    ({key: value for key, value in SLURM.items() if "STEP" not in key}, Job()),  # the batch script: no step
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, Job()),
  ],
)
def test_every_launcher_is_understood(environ, expected):
  assert find(environ=environ) == expected


def test_flags_come_before_variables_and_variables_before_launchers():
  everything = JAX | SLURM | OPEN_MPI | GKE
  given = {"coordinator": "b:2", "num_processes": 8, "process_id": 5}
  assert find(**given, environ=everything) == Job("b:2", 8, 5, None, "flags")
  assert find(environ=everything).source == "environment"
  assert find(environ=SLURM | OPEN_MPI | GKE).source == "Slurm"
  assert find(environ=OPEN_MPI | GKE).source == "Open MPI"
  mixed = find(coordinator="b:2", environ=SLURM)
  assert mixed == Job("b:2", 4, 2, None, "flags and Slurm")


def test_devices_of_a_process_are_a_flag_or_a_variable():
  assert find(local_device_ids=[2, 3], environ=JAX | {"JAX_LOCAL_DEVICE_IDS": "0"}).local_device_ids == (2, 3)
  assert find(environ={"JAX_LOCAL_DEVICE_IDS": "0,1"}) == Job(local_device_ids=(0, 1))


@pytest.mark.parametrize(
  ("flags", "environ", "words"),
  [
    ({"num_processes": 2}, {}, ["--coordinator, --process_id: not given", "num_processes=2 from flags"]),
    ({}, {"JAX_COORDINATOR_ADDRESS": "a:1"}, ["--num_processes, --process_id: not given"]),
    ({"coordinator": "node1"}, SLURM, ["--coordinator=node1: must be HOST:PORT"]),
    ({"process_id": 4}, SLURM, ["--process_id=4: must be one of 0 … 3"]),
    ({}, JAX | {"JAX_PROCESS_ID": "one"}, ["JAX_PROCESS_ID=one: is no number"]),
    ({}, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, ["--coordinator: not given", "Open MPI"]),
  ],
)
def test_what_is_missing_or_wrong_is_named(flags, environ, words):
  with pytest.raises(JoinError) as error:
    find(**flags, environ=environ)
  assert all(word in str(error.value) for word in words), str(error.value)


def test_a_tpu_machine_is_asked_for_its_metadata(monkeypatch):
  attributes = {
    "worker-network-endpoints": "unknown:unknown:10.0.0.4,unknown:unknown:10.0.0.5",
    "agent-worker-number": "1",
    "tpu-env": "ZONE: 'x'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9'",
  }

  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      assert self.headers["Metadata-Flavor"] == "Google"
      self.send_response(200)
      self.end_headers()
      self.wfile.write(attributes[self.path.rsplit("/", 1)[1]].encode())

    def log_message(self, *unused):
      pass

  monkeypatch.setattr(processes, "_on_tpu_machine", lambda _: True)
  with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    job = find(environ={"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"})
    server.shutdown()
  assert job == Job("10.0.0.9:8476", 4, 3, None, "Cloud TPU")


def see(host: str, *gpus: str) -> dict:
  return {"host": host, "gpus": list(gpus)}


def test_gpus_seen_by_several_processes_are_divided_between_them():
  four = ("g0", "g1", "g2", "g3")
  assert divide_gpus([see("a", *four), see("a", *four), see("b", *four)]) == [[0, 1], [2, 3], None]
  assert divide_gpus([see("a", "g0", "g1"), see("a", "g2", "g3")]) == [None, None]  # the launcher has divided them
  assert divide_gpus([see("a"), see("a"), {"host": "a", "gpus": None}]) == [None, None, None]
  with pytest.raises(JoinError, match="3 processes on a see the same 2 GPU"):
    divide_gpus([see("a", "g0", "g1")] * 3)


def test_visible_gpus_are_those_that_cuda_may_use(tmp_path, monkeypatch):
  smi = tmp_path / "nvidia-smi"
  smi.write_text("#!/bin/sh\nprintf 'GPU-x\\nGPU-y\\nGPU-z\\n'\n")
  smi.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
  seen = lambda **environ: processes._visible_gpus({"JAX_PLATFORMS": "cuda", **environ})  # noqa: E731
  assert seen() == ["GPU-x", "GPU-y", "GPU-z"]
  assert seen(CUDA_VISIBLE_DEVICES="2,0") == ["GPU-z", "GPU-x"]
  assert seen(CUDA_VISIBLE_DEVICES="GPU-y") == ["GPU-y"]
  assert processes._visible_gpus({"JAX_PLATFORMS": "cpu"}) == []


def test_an_agreement_of_one_process_is_the_next_step_and_once():
  stop = processes.Agreement("stop")
  assert not stop.due(1)
  stop.ask()
  assert stop.due(2) and not stop.due(3)


def test_telling_variables_are_shown_and_no_secret():
  secrets = {"AWS_SECRET_ACCESS_KEY": "s", processes.SECRET: "s", "HOME": "/h"}
  assert set(processes.environment(JAX | {"XLA_FLAGS": "-x"} | secrets)) == {*JAX, "XLA_FLAGS"}


def test_the_secret_is_long_or_refused():
  assert processes._secret({}) == processes._secret({processes.SECRET: " "}) == b""
  assert processes._secret({processes.SECRET: f"{'x' * 64}\n"}) == b"x" * 64
  with pytest.raises(JoinError, match="VIT_JAX_JOB_SECRET has 6 characters: .* `openssl rand -hex 32`"):
    processes._secret({processes.SECRET: "hunter"})


@pytest.mark.parametrize(
  ("coordinator", "words"),
  [("127.0.0.1:9876", "any user of this machine can"), ("node1:9876", "whoever reaches port 9876 of node1 can")],
)
def test_a_job_without_a_secret_is_warned_of_who_may_join(coordinator, words, caplog):
  processes._warn_of_strangers(Job(coordinator, 2, 0))
  assert words in caplog.text and "VIT_JAX_JOB_SECRET is not set" in caplog.text


def test_who_speaks_of_its_gpus_in_another_way_is_named():
  first, second = see("a"), see("b")
  for wrong in (3, [1]):
    with pytest.raises(JoinError, match="a process on b speaks of its GPUs in another way"):
      processes._answers("node1:9876", [first, second | {"gpus": wrong}])
