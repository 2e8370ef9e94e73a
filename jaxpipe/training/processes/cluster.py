"""Finds out, from what a cluster tells its processes, which process of a job this one is.

JAX can find this out as well, but does not reveal where process 0 is, and process 0 needs its own
address to listen at. Sources, by kind of cluster:

    Slurm            SLURM_PROCID of SLURM_NTASKS, the first on the first of SLURM_STEP_NODELIST
    TPU on GKE       TPU_WORKER_ID of TPU_WORKER_HOSTNAMES, and MEGASCALE_* of several slices
    Cloud TPU pod    the same, from the machine's metadata
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

_TPU_PORT = 8482  # JAX's own choice there
# Two jobs of Slurm may share a machine: each takes a port by its number.
_SLURM_PORTS = range(61440, 65536)
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def detect(
  environment: Mapping[str, str], metadata: Callable[[str], str] | None = None
) -> dict[str, Any] | None:
  """Finds this process's place in a job.

  Args:
    environment: variables of the process.
    metadata: `name -> value` of an attribute of a Cloud TPU machine; raises OSError where there is
      none. By default the machine's metadata server is asked.

  Returns:
    `coordinator`, `process_id` and `num_processes`, as the flags of these names; None where there
    is no cluster.
  """
  if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
    return _slurm(environment)
  if "TPU_WORKER_HOSTNAMES" in environment and "TPU_WORKER_ID" in environment:
    return _tpu(environment)
  try:
    return _tpu(_pod(metadata or _read))
  except OSError:
    return None


def _slurm(environment: Mapping[str, str]) -> dict[str, Any]:
  """The place in a step of a Slurm job; its first node has process 0."""
  # Forms of the list: node7   node7,node9   node[07-12,15],other3
  first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", environment["SLURM_STEP_NODELIST"])
  host = "".join(filter(None, first.groups())) if first else ""
  port = _SLURM_PORTS[int(environment["SLURM_JOB_ID"]) % len(_SLURM_PORTS)]
  return {
    "coordinator": f"{host}:{port}",
    "process_id": int(environment["SLURM_PROCID"]),
    "num_processes": int(environment["SLURM_NTASKS"]),
  }


def _tpu(environment: Mapping[str, str]) -> dict[str, Any]:
  """The place in a job on one or several TPU slices; the first host of slice 0 has process 0."""
  hosts = environment["TPU_WORKER_HOSTNAMES"].split(",")
  first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or hosts[0]
  which = int(environment.get("MEGASCALE_SLICE_ID", 0))
  return {
    "coordinator": f"{first}:{_TPU_PORT}",
    "process_id": which * len(hosts) + int(environment["TPU_WORKER_ID"]),
    "num_processes": int(environment.get("MEGASCALE_NUM_SLICES", 1)) * len(hosts),
  }


def _pod(metadata: Callable[[str], str]) -> dict[str, str]:
  """The metadata of a Cloud TPU machine, as the variables that GKE would set."""
  # Each endpoint is HOST, or NAME:ID:ADDRESS on older machines.
  hosts = [word.split(":")[-1] for word in metadata("worker-network-endpoints").split(",")]
  slices = re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)", metadata("tpu-env"), re.MULTILINE)
  worker = metadata("agent-worker-number")
  return dict(slices) | {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "TPU_WORKER_ID": worker}


def _read(attribute: str) -> str:
  """Asks this machine's metadata server, past any proxy."""
  request = urllib.request.Request(_METADATA + attribute, headers={"Metadata-Flavor": "Google"})
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  with direct.open(request, timeout=5) as answer:
    text: str = answer.read().decode()
  return text
