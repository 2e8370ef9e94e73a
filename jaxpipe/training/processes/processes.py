"""Runs of several processes: how they start, and what they agree on while they run.

Every process runs the same command, holds its own devices of one mesh and reads its own rows. A
process that takes another course than the others leaves them waiting in a collective. So whatever
decides the course is agreed on:

    start         all processes are there, with equally many devices
    agreed        whether the command and its input are right
    check_same    that all mean the same run
    Signals       after which step a signal ends it

Process 0 alone prints and writes, but for the checkpoints, of which each process writes its part.
"""

from __future__ import annotations

import collections
import dataclasses
import ipaddress
import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from jaxpipe.training.flags.errors import AgreedError, ConfigError
from jaxpipe.training.processes import cluster
from jaxpipe.training.processes.rendezvous import meet

Result = TypeVar("Result")

# Seconds after which a killed process is noticed, wherever a collective did not notice it first.
_HEARTBEAT = 60
_SHUTDOWN = 60  # seconds in which all must leave; they have waited for each other before
_MESSAGE = 1000  # bytes of an error's text that are sent to the other processes


def _field(default: Any, help: str) -> Any:
  return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
  """The flags by which the processes of a run find each other, whatever it trains.

  Each field is a flag, and its help text says what it means.

  Raises:
    ConfigError: some of the three that belong together are missing, or a value is impossible.
  """

  coordinator: str = _field("", "HOST:PORT on the machine of process 0, where all processes meet")
  process_id: int = _field(-1, "number of this process, from 0; with --coordinator")
  num_processes: int = _field(0, "processes of the run; with --coordinator")
  distributed: str = _field(
    "", "auto: Slurm, GKE or the Cloud TPU pod says which process this is, and where process 0 is"
  )
  start_timeout: float = _field(300.0, "seconds within which all processes must have started")

  def __post_init__(self) -> None:
    three = {
      "coordinator": bool(self.coordinator),
      "process_id": self.process_id != -1,
      "num_processes": self.num_processes != 0,
    }
    given = [f"--{name}={getattr(self, name)}" for name, there in three.items() if there]
    missing = [f"--{name}" for name, there in three.items() if not there]
    if given and missing:
      raise ConfigError(f"{' '.join(given)}: {' and '.join(missing)} missing; give all three")
    if self.distributed not in ("", "auto"):
      raise ConfigError(f"--distributed={self.distributed} is unknown; use auto, or leave it out")
    if given and self.distributed:
      raise ConfigError(f"{given[0]} --distributed=auto: both say where process 0 is; give one")
    if not (math.isfinite(self.start_timeout) and self.start_timeout > 0):
      raise ConfigError(f"--start_timeout={self.start_timeout:g} is no time; use seconds above 0")
    if given:
      self._check_numbers()

  def _check_numbers(self) -> None:
    if self.num_processes < 1:
      raise ConfigError(f"--num_processes={self.num_processes} is not a count; use 1 or more")
    if not 0 <= self.process_id < self.num_processes:
      raise ConfigError(
        f"--process_id={self.process_id} --num_processes={self.num_processes}: the numbers are 0 to"
        f" {self.num_processes - 1}"
      )
    host, _, port = self.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
      raise ConfigError(f"--coordinator={self.coordinator} is not HOST:PORT; use localhost:12345")


def start(processes: Processes, environment: Mapping[str, str] = os.environ) -> None:
  """Joins the other processes, if there are any; call it before anything asks JAX for a device.

  Args:
    processes: the flags.
    environment: variables in which `--distributed=auto` looks for a cluster.

  Raises:
    ConfigError: no cluster was found, or not all processes came in time.
  """
  if processes.distributed:
    found = cluster.detect(environment)
    if found is None:
      raise ConfigError(
        "--distributed=auto: neither Slurm, GKE nor a Cloud TPU pod is to be seen here; give"
        " --coordinator=HOST:PORT --process_id=I --num_processes=N"
      )
    processes = dataclasses.replace(processes, distributed="", **found)
  if processes.num_processes <= 1:
    return
  host, port = _resolve(processes.coordinator, processes.start_timeout)
  meet(host, port, processes.process_id, processes.num_processes, processes.start_timeout)
  # Its handler would swallow SIGTERM, which `Signals` is there for.
  jax.config.update("jax_enable_preemption_service", False)
  address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
  jax.distributed.initialize(
    address,
    processes.num_processes,
    processes.process_id,
    cluster_detection_method="deactivate",
    # Left out, JAX would listen at every address of the machine.
    coordinator_bind_address=address,
    initialization_timeout=max(30, math.ceil(processes.start_timeout)),
    heartbeat_timeout_seconds=_HEARTBEAT,
    shutdown_timeout_seconds=_SHUTDOWN,
  )
  devices = collections.Counter(device.process_index for device in jax.devices())
  if len(set(devices.values())) > 1:
    # All processes see these counts, and so all raise this error without a message between them.
    counts = ", ".join(str(devices[i]) for i in range(processes.num_processes))
    raise AgreedError(
      f"processes have {counts} devices; let all have as many", processes.process_id
    )


def _resolve(coordinator: str, timeout: float) -> tuple[str, int]:
  """Returns the numeric address and the port of a coordinator given as HOST:PORT.

  A cluster may know the name only once process 0 runs: until `timeout` seconds are over, an unknown
  name is looked up again.

  Raises:
    ConfigError: an unknown name, or an address that stands for every network of the machine.
  """
  host, _, port = coordinator.rpartition(":")
  end = time.monotonic() + timeout
  while True:
    try:
      found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
      break
    except socket.gaierror as error:
      if time.monotonic() > end:
        raise ConfigError(f"--coordinator={coordinator}: {host}: {error.strerror}") from None
    time.sleep(0.5)
  # IPv4 first, in every process: `localhost` stands for an address of either kind.
  address = str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])
  if ipaddress.ip_address(address.partition("%")[0]).is_unspecified:
    raise ConfigError(
      f"--coordinator={coordinator} would listen on every network of the machine; use localhost,"
      " or the machine's address in the cluster"
    )
  return address, int(port)


def several() -> bool:
  """Returns whether the run has more than one process."""
  return jax.distributed.is_initialized()


def is_first() -> bool:
  """Returns whether this process is the one that prints and writes."""
  return not several() or jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line, in process 0 alone."""
  if is_first():
    print(text, flush=True)


def wait(name: str) -> None:
  """Returns once all processes have called it.

  Args:
    name: of the place in the program, equal in all processes.
  """
  if several():
    multihost_utils.sync_global_devices(name)


def agreed(step: Callable[[], Result]) -> Result:
  """Returns `step()`, unless it fails in any process: then it fails in all.

  Raises:
    AgreedError: in place of a ValueError or OSError, with the text of the first that has one.
  """
  if not several():
    return step()
  said = ""
  try:
    result = step()
  except (ValueError, OSError) as error:
    said = str(error) or type(error).__name__
  text = said.encode()[:_MESSAGE]
  # Every process sends a text of one length, which is empty where nothing is wrong.
  sent = np.zeros(_MESSAGE, np.uint8)
  sent[: len(text)] = np.frombuffer(text, np.uint8)
  for process, row in enumerate(multihost_utils.process_allgather(sent)):
    text = row.tobytes().rstrip(b"\0")
    if text:
      whose = f"process {process}: " if process else ""
      raise AgreedError(whose + text.decode(errors="replace"), jax.process_index())
  return result


def from_first(value: Any) -> Any:
  """Returns the JSON value that process 0 has, in all processes; all must call it."""
  if not several():
    return value
  text = json.dumps(value).encode()
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  sent = np.zeros(size, np.uint8)
  if is_first():
    sent[:] = np.frombuffer(text, np.uint8)
  received: Any = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())
  return received


def check_same(values: Mapping[str, Any], may_differ: frozenset[str] = frozenset()) -> None:
  """Refuses to go on where the processes do not mean the same run.

  Args:
    values: JSON values by name, which decide the course of the run.
    may_differ: names of values that may differ between processes.

  Raises:
    AgreedError: names the first value that differs.
  """
  theirs = from_first(dict(values))

  def compare() -> None:
    for name, value in values.items():
      if name not in may_differ and value != theirs.get(name):
        raise ConfigError(f"{name} is {value!r}, and {theirs.get(name)!r} in process 0")

  agreed(compare)


class Signals:
  """Makes a signal that one process has received known to all of them after the same step.

  With every step a small program takes the maximum of the processes' signal numbers. Its result is
  read one step later, when that step has been waited for anyway, so that nothing waits for it. A
  run of one process does without.

  Args:
    mesh: of the run.

  Attributes:
    received: the signal that all processes are to end by; None until there is one.
  """

  def __init__(self, mesh: Mesh) -> None:
    self.received: signal.Signals | None = None
    self._under_way: jax.Array | None = None
    self._size = mesh.size
    self._each = NamedSharding(mesh, Spec(mesh.axis_names))
    self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, Spec()))

  def agree(self, received: signal.Signals | None) -> None:
    """Sends what this process has received, and updates `received`.

    Every process must call it at every step, after the step's dispatch.

    Args:
      received: the signal that this process has received, or None.
    """
    if not several():
      self.received = received
      return
    # An element for each device of the mesh: 0 stands for no signal.
    own = np.full(1, received or 0, np.int32)
    numbers = jax.make_array_from_callback((self._size,), self._each, lambda _: own)
    before, self._under_way = self._under_way, self._largest(numbers)
    number = 0 if before is None else int(before)
    self.received = signal.Signals(number) if number else None
