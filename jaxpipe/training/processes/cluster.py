"""Which process of a cluster's job this is, from what the cluster tells each of them.

JAX can find out as well, but keeps to itself where process 0 is, which decides what it listens at.

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
# One job of Slurm may share a machine with another.
_SLURM_PORTS = range(61440, 65536)
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def detect(
  environment: Mapping[str, str], metadata: Callable[[str], str] | None = None
) -> dict[str, Any] | None:
  """Finds this process's place in a job.

  Args:
    environment: of the process.
    metadata: reads an attribute of a Cloud TPU machine, raising OSError where there is none.

  Returns:
    `coordinator`, `process_id` and `num_processes`, or None where no cluster is seen.
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
  # node7   node7,node9   node[07-12,15],other3
  first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", environment["SLURM_STEP_NODELIST"])
  host = "".join(filter(None, first.groups())) if first else ""
  port = _SLURM_PORTS[int(environment["SLURM_JOB_ID"]) % len(_SLURM_PORTS)]
  return {
    "coordinator": f"{host}:{port}",
    "process_id": int(environment["SLURM_PROCID"]),
    "num_processes": int(environment["SLURM_NTASKS"]),
  }


def _tpu(environment: Mapping[str, str]) -> dict[str, Any]:
  hosts = environment["TPU_WORKER_HOSTNAMES"].split(",")
  first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or hosts[0]
  which = int(environment.get("MEGASCALE_SLICE_ID", 0))
  return {
    "coordinator": f"{first}:{_TPU_PORT}",
    "process_id": which * len(hosts) + int(environment["TPU_WORKER_ID"]),
    "num_processes": int(environment.get("MEGASCALE_NUM_SLICES", 1)) * len(hosts),
  }


def _pod(metadata: Callable[[str], str]) -> dict[str, str]:
  # Each is HOST, or NAME:ID:ADDRESS on older machines.
  hosts = [word.split(":")[-1] for word in metadata("worker-network-endpoints").split(",")]
  slices = re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)", metadata("tpu-env"), re.MULTILINE)
  worker = metadata("agent-worker-number")
  return dict(slices) | {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "TPU_WORKER_ID": worker}


def _read(attribute: str) -> str:
  request = urllib.request.Request(_METADATA + attribute, headers={"Metadata-Flavor": "Google"})
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  with direct.open(request, timeout=5) as answer:
    text: str = answer.read().decode()
  return text
