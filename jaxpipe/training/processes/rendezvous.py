"""Waits for all processes of a run before JAX starts, and names those that do not come.

JAX's own start waits as well, but when a process never arrives it kills the others with a stack
trace that does not say which. So process 0 first listens at the coordinator's address itself, and
lines of text go over each connection:

    process i    -> process 0     jaxpipe I N     process I of N has started
    process 0    -> all           COUNT           so many have started; N: go on
    process 0    -> all           !MESSAGE        the run cannot start, and why

The other processes close their connections first, once they have read N, so that the port is free
again when JAX's coordinator takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno

from jaxpipe.training.flags.errors import AgreedError, ConfigError

_HELLO = b"jaxpipe"
_RETRY = 0.1  # seconds between attempts to reach process 0
_GRACE = 10.0  # seconds that process 0 may be late with its answer


def meet(host: str, port: int, process: int, count: int, timeout: float) -> None:
  """Returns once all processes of a run have started.

  Args:
    host: numeric address of process 0, which listens there and nowhere else.
    port: that it listens at; free again when this returns.
    process: number of this process, from 0.
    count: processes of the run.
    timeout: seconds in which all must start; to other processes than 0, in which they must reach
      process 0.

  Raises:
    ConfigError: they did not all come, some came twice, or the address cannot be listened at.
  """
  asyncio.run(
    _join(host, port, process, count, timeout) if process else _receive(host, port, count, timeout)
  )


def _missing(came: int, count: int, timeout: float, missing: str) -> str:
  """Words the error of processes that did not come in time."""
  return f"{came} of {count} processes came within --start_timeout={timeout:g} seconds; {missing}"


class _Host:
  """Process 0's side: it counts the connections, and answers all of them."""

  def __init__(self, count: int) -> None:
    self._count = count
    self._came: dict[int, asyncio.StreamWriter] = {}  # by process, until it leaves
    self._left = asyncio.Event()
    # Set once: to None where all have come, else to the reason why the run cannot start.
    self._answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

  async def receive(self, host: str, port: int, timeout: float) -> None:
    """Returns once all have come and left again; raises AgreedError where they did not come."""
    try:
      server = await asyncio.start_server(self._greet, host, port)
    except OSError as error:
      why = "is not this machine's" if error.errno == errno.EADDRNOTAVAIL else f"({error.strerror})"
      raise ConfigError(
        f"process 0 cannot listen at {host}:{port}, which {why}; --coordinator is a free port of"
        " the machine that process 0 runs on"
      ) from None
    try:
      refused = await asyncio.wait_for(asyncio.shield(self._answer), timeout)
    except TimeoutError:
      absent = [str(i) for i in range(1, self._count) if i not in self._came]
      missing = f"process {', '.join(absent)} did not"
      refused = _missing(len(self._came) + 1, self._count, timeout, missing)
    if refused:
      self._send(f"!{refused}")
      raise AgreedError(refused, 0)
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(self._left.wait(), _GRACE)
    server.close()

  async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serves one connection until the other side closes it."""
    process = 0
    # Whoever says anything else, such as a cluster's health check, is no process of the run.
    with contextlib.suppress(ValueError, OSError):
      hello, *numbers = (await reader.readline()).split()
      process, count = map(int, numbers)
      if hello == _HELLO:
        self._arrive(process, count, writer)
        await reader.read()  # until it leaves
    if self._came.get(process) is writer:
      del self._came[process]
      if not self._came and self._answer.done():
        self._left.set()
    writer.close()

  def _arrive(self, process: int, count: int, writer: asyncio.StreamWriter) -> None:
    """Counts a process, or refuses it; the answer is settled by the last one, or by a wrong one."""
    refused = None
    if count != self._count:
      refused = f"process {process} awaits --num_processes={count}, process 0 {self._count}"
    elif not 0 < process < count or process in self._came:
      refused = f"--process_id={process} came twice; each process has an own number"
    if refused:
      writer.write(f"!{refused}\n".encode())
    else:
      self._came[process] = writer
      self._send(str(len(self._came) + 1))
    if not self._answer.done() and (refused or len(self._came) + 1 == self._count):
      self._answer.set_result(refused)

  def _send(self, line: str) -> None:
    """Sends a line to every process that has come."""
    for writer in self._came.values():
      writer.write(f"{line}\n".encode())


async def _receive(host: str, port: int, count: int, timeout: float) -> None:
  # Made inside the event loop, whose future it holds.
  await _Host(count).receive(host, port, timeout)


async def _join(host: str, port: int, process: int, count: int, timeout: float) -> None:
  """The other processes' side: reaches process 0, and reads its lines until all have come."""
  try:
    reader, writer = await asyncio.wait_for(_reach(host, port), timeout)
  except TimeoutError:
    silent = f"process 0 does not answer at {host}:{port}"
    raise ConfigError(_missing(1, count, timeout, silent)) from None
  came, refused = 1, ""
  # Longer than process 0 waits: its answer, which names who is missing, comes first.
  with contextlib.suppress(TimeoutError, ValueError, OSError):
    async with asyncio.timeout(timeout + _GRACE):
      writer.write(b"%s %d %d\n" % (_HELLO, process, count))
      while came < count and not refused:
        line = (await reader.readline()).decode().strip()
        refused = line[1:] if line.startswith("!") else ""
        came = came if refused else int(line)
  writer.close()
  if refused:
    raise AgreedError(refused, process)
  if came < count:
    raise ConfigError(_missing(came, count, timeout, f"process 0 at {host}:{port} has left"))


async def _reach(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
  """Connects to process 0, again and again until it listens."""
  while True:
    with contextlib.suppress(OSError):
      return await asyncio.open_connection(host, port)
    await asyncio.sleep(_RETRY)
