"""Runs that several processes share: who starts them, what they agree on, and the same numbers."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxpipe import make_mesh
from jaxpipe.pipeline.batch import Microbatches, microbatches
from jaxpipe.training.flags.errors import AgreedError, ConfigError
from jaxpipe.training.flags.settings import show_flag
from jaxpipe.training.lm.config import Config
from jaxpipe.training.plan.rows import ProcessRows
from jaxpipe.training.processes import processes
from jaxpipe.training.processes.cluster import detect
from jaxpipe.training.processes.processes import Processes
from jaxpipe.training.processes.rendezvous import meet

ROOT = Path(__file__).parents[3]
HERE = "127.0.0.1"

MakeConfig = Callable[..., Config]


def free_port() -> int:
  with socket.create_server((HERE, 0)) as server:
    port: int = server.getsockname()[1]
  return port


def environment(devices: int = 8) -> dict[str, str]:
  """One in which `jaxpipe` is this repository's, and each process has so many devices."""
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
  return os.environ | {
    "XLA_FLAGS": flags,
    "PYTHONPATH": str(ROOT),
    "JAXPIPE_NO_SETUP": "1",
    "JAXPIPE_PYTHON": sys.executable,
  }


# Flags


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ({"coordinator": "a:1"}, ["--coordinator=a:1", "--process_id and --num_processes missing"]),
    ({"process_id": 1, "num_processes": 2}, ["--process_id=1", "--coordinator missing"]),
    ({"coordinator": "a:1", "num_processes": 2}, ["--process_id missing"]),
    ({"coordinator": "a:1", "process_id": 2, "num_processes": 2}, ["=2", "0 to 1"]),
    ({"coordinator": "a:1", "process_id": 0, "num_processes": -1}, ["--num_processes=-1"]),
    ({"coordinator": "a", "process_id": 0, "num_processes": 2}, ["--coordinator=a ", "HOST:PORT"]),
    ({"coordinator": "a:0", "process_id": 0, "num_processes": 2}, ["--coordinator=a:0"]),
    ({"distributed": "slurm"}, ["--distributed=slurm", "auto"]),
    (
      {"coordinator": "a:1", "process_id": 0, "num_processes": 2, "distributed": "auto"},
      ["--coordinator=a:1 --distributed=auto"],
    ),
    ({"start_timeout": 0.0}, ["--start_timeout=0"]),
    ({"start_timeout": float("nan")}, ["--start_timeout=nan"]),
  ],
)
def test_flags_that_cannot_be_meant_are_named(given: dict[str, Any], words: list[str]) -> None:
  with pytest.raises(ConfigError) as error:
    Processes(**given)
  assert all(word in str(error.value) for word in words), error.value


def test_one_process_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(processes, "meet", None)  # would fail if it were called
  processes.start(Processes())
  processes.start(Processes(coordinator=f"{HERE}:1", process_id=0, num_processes=1))
  assert not processes.several() and processes.is_first()


@pytest.mark.parametrize(
  ("seen", "coordinator", "process", "count"),
  [
    ({"SLURM_STEP_NODELIST": "gpu7", "SLURM_JOB_ID": "5"}, "gpu7:61445", 3, 8),
    ({"SLURM_STEP_NODELIST": "gpu[07-12,15],b3", "SLURM_JOB_ID": "4096"}, "gpu07:61440", 3, 8),
    ({"SLURM_STEP_NODELIST": "a1,a[2-4]", "SLURM_JOB_ID": "4097"}, "a1:61441", 3, 8),
    ({"TPU_WORKER_HOSTNAMES": "w-0.x,w-1.x", "TPU_WORKER_ID": "1"}, "w-0.x:8482", 1, 2),
    (
      {
        "TPU_WORKER_HOSTNAMES": "w-0.x,w-1.x",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_NUM_SLICES": "4",
        "MEGASCALE_COORDINATOR_ADDRESS": "first.x:8080",
      },
      "first.x:8482",
      5,
      8,
    ),
  ],
)
def test_a_cluster_says_which_process_this_is(
  seen: dict[str, str], coordinator: str, process: int, count: int
) -> None:
  tasks = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"} if "SLURM_JOB_ID" in seen else {}
  want = {"coordinator": coordinator, "process_id": process, "num_processes": count}
  assert detect({**seen, **tasks}) == want


@pytest.mark.parametrize("hosts", ["10.1.0.2,10.1.0.3", "a:b:10.1.0.2,c:d:10.1.0.3"])
def test_a_tpu_machine_is_asked_for_its_metadata(hosts: str) -> None:
  said = {
    "worker-network-endpoints": hosts,
    "agent-worker-number": "1",
    "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
  }
  want = {"coordinator": "10.1.0.2:8482", "process_id": 3, "num_processes": 4}
  assert detect({}, said.__getitem__) == want


def test_no_cluster_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
  def nobody(_: str) -> str:
    raise OSError("no such host")

  assert detect({}, nobody) is None
  monkeypatch.setattr(processes.cluster, "detect", lambda _: None)
  with pytest.raises(ConfigError, match="give --coordinator=HOST:PORT"):
    processes.start(Processes(distributed="auto"))


# The start


def gather(*calls: Callable[[], None]) -> list[str]:
  """Calls each in a thread of its own; returns what each raised, as text."""
  said = ["" for _ in calls]

  def run(i: int, call: Callable[[], None]) -> None:
    try:
      call()
    except ConfigError as error:
      said[i] = str(error)

  threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return said


def come(port: int, process: int, count: int, timeout: float = 30) -> Callable[[], None]:
  return lambda: meet(HERE, port, process, count, timeout)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_meet_in_any_order_and_leave_the_port(order: tuple[int, ...]) -> None:
  port = free_port()
  assert gather(*[come(port, i, 3) for i in order]) == ["", "", ""]
  with socket.create_server((HERE, port)):
    pass


def test_who_does_not_come_is_named_to_all_that_did() -> None:
  port = free_port()
  said = gather(come(port, 0, 4, 1), come(port, 2, 4))
  want = "2 of 4 processes came within --start_timeout=1 seconds; process 1, 3 did not"
  assert said == [want, want]
  (said_alone,) = gather(come(free_port(), 1, 2, 0.3))
  assert said_alone.startswith("1 of 2 processes came") and "process 0 does not" in said_alone


def test_processes_of_two_runs_do_not_mix() -> None:
  port = free_port()
  said = gather(come(port, 0, 3), come(port, 1, 2))
  assert said == ["process 1 awaits --num_processes=2, process 0 3"] * 2
  port = free_port()
  said = gather(*[come(port, i, 3) for i in (0, 1, 1)])
  assert said == ["--process_id=1 came twice; each process has an own number"] * 3


def test_strangers_neither_count_nor_disturb() -> None:
  port = free_port()

  async def strangers() -> None:
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"jaxpipe 1\n", b""):
      while True:
        try:
          _, writer = await asyncio.open_connection(HERE, port)
          break
        except OSError:
          await asyncio.sleep(0.01)
      writer.write(words)
      if words:
        writer.close()
    meet_rest.set()
    await asyncio.to_thread(done.wait)  # the last says nothing, and stays
    writer.close()

  meet_rest, done = threading.Event(), threading.Event()

  def late() -> None:
    meet_rest.wait()
    try:
      come(port, 1, 2)()
    finally:
      done.set()

  calls = (come(port, 0, 2), late, lambda: asyncio.run(strangers()))
  assert gather(*calls) == ["", "", ""]


@pytest.mark.parametrize(
  ("coordinator", "words"),
  [
    ("192.0.2.1:2000", "192.0.2.1:2000, which is not this machine's"),
    ("0.0.0.0:2000", "would listen on every network"),
    ("[::]:2000", "would listen on every network"),
  ],
)
def test_an_address_that_is_not_process_0s_own(coordinator: str, words: str) -> None:
  with pytest.raises(ConfigError, match=re.escape(words)):
    processes.start(Processes(coordinator=coordinator, process_id=0, num_processes=2))


def test_jax_listens_at_the_coordinators_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
  seen: dict[str, Any] = {}
  monkeypatch.setattr(processes, "meet", lambda *_: None)
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: seen.update(kw, args=args))
  processes.start(Processes(coordinator="localhost:2000", process_id=1, num_processes=2))
  assert seen["args"] == (f"{HERE}:2000", 2, 1)
  assert seen["coordinator_bind_address"] == f"{HERE}:2000"


def test_a_process_that_never_arrives_ends_the_command_in_one_line(tmp_path: Path) -> None:
  source = "from jaxpipe.training.lm.command import run_lm\n"
  source += "from jaxpipe.training.lm.config import Config\nrun_lm(Config())"
  flags = [f"--coordinator={HERE}:{free_port()}", "--process_id=0", "--num_processes=2"]
  done = subprocess.run(
    [sys.executable, "-c", source, *flags, "--start_timeout=0.5"],
    env=environment(),
    cwd=tmp_path,
    text=True,
    capture_output=True,
    timeout=60,
    check=False,
  )
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == (
    "-c: 1 of 2 processes came within --start_timeout=0.5 seconds; process 1 did not\n"
  )


# Rows


def test_one_process_reads_all_rows() -> None:
  mesh = make_mesh("stage:2,data:2,fsdp:2")
  rows = ProcessRows(mesh, 16, 2)
  assert rows.rows == list(range(16))
  whole = {"x": np.arange(48, dtype=np.int32).reshape(16, 3)}
  put, want = rows.put(whole), microbatches(whole, 2, 4)
  np.testing.assert_array_equal(put.leaves["x"], want["x"])
  shapes = rows.shapes(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole))
  assert shapes.leaves["x"].shape == (2, 8, 3)
  assert put.leaves["x"].sharding == shapes.leaves["x"].sharding
  assert {shard.data.shape for shard in put.leaves["x"].addressable_shards} == {(2, 2, 3)}


@pytest.mark.parametrize("shape", [(4, 2, 3), (2, 3, 3), (2,)])
def test_a_batch_that_was_cut_otherwise_is_refused(shape: tuple[int, ...]) -> None:
  good = Microbatches({"x": np.zeros((2, 4, 3))})
  assert microbatches(good, 2, 2)["x"] is good.leaves["x"]
  with pytest.raises(ValueError, match=r"microbatches\['x'\]|cannot be cut"):
    microbatches(Microbatches({"x": np.zeros(shape)}), 2, 2)


# Two processes


TWO = """
import json, signal, sys
import numpy as np
from jaxpipe import make_mesh
from jaxpipe.training.processes import processes
from jaxpipe.training.plan.rows import ProcessRows
from jaxpipe.training.flags.settings import show_flag

me = int(sys.argv[2])
processes.start(processes.Processes(coordinator=sys.argv[1], process_id=me, num_processes=2))
told = {"first": processes.is_first()}

def tell(name, call):
  try:
    told[name] = call()
  except ValueError as error:
    told[name] = f"{type(error).__name__} {error}"

tell("own", lambda: processes.agreed(lambda: me + 10))

def fail(who):
  if me in who:
    raise OSError(f"no disk at {me}, naïve")

tell("one fails", lambda: processes.agreed(lambda: fail([1])))
tell("both fail", lambda: processes.agreed(lambda: fail([0, 1])))
tell("sent", lambda: processes.from_first({"a": [me, None]}))
tell("same", lambda: processes.check_same({"a": 1, "path": me}, frozenset({"path"})))
tell("other", lambda: processes.check_same({"a": 1, "steps": me}))

signals, seen = processes.Signals(make_mesh("stage:4,data:2")), []
for call in range(4):
  signals.agree(signal.SIGTERM if me == 1 and call >= 1 else None)
  seen.append(signals.received)
told["signals"] = seen

whole = np.arange(16, dtype=np.int32)
for text in ("data:8", "stage:2,data:4", "data:2,stage:4", "data:2,tensor:4"):
  rows = ProcessRows(make_mesh(text), 16, 2)
  shards = rows.put(whole[rows.rows]).leaves.addressable_shards
  told[text] = rows.rows, [(s.device.id % 4, s.data.tolist()) for s in shards]

def few():
  ProcessRows(make_mesh("stage:2,data:2"), 16, 2)

tell("few", lambda: processes.agreed(few))
processes.say("said once")
processes.wait("end")
print("TOLD", json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
  """What each of two processes of four devices printed."""
  script = tmp_path_factory.mktemp("two") / "two.py"
  script.write_text(TWO)
  where = f"{HERE}:{free_port()}"
  started = [
    subprocess.Popen(
      [sys.executable, script, where, str(i)],
      env=environment(4),
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for i in range(2)
  ]
  found = []
  for i, process in enumerate(started):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert ("said once" in out) == (i == 0)
    found.append(json.loads(out.partition("TOLD ")[2]))
  return found


def test_processes_agree(told: list[dict[str, Any]]) -> None:
  zero, one = told
  assert (zero["first"], one["first"]) == (True, False)
  assert (zero["own"], one["own"]) == (10, 11)
  for name, want in {
    "one fails": "AgreedError process 1: no disk at 1, naïve",
    "both fail": "AgreedError no disk at 0, naïve",
    "sent": {"a": [0, None]},
    "same": None,
    "other": "AgreedError process 1: steps is 1, and 0 in process 0",
    # Sent with the second call, and looked at with the third.
    "signals": [None, None, int(signal.SIGTERM), int(signal.SIGTERM)],
  }.items():
    assert zero[name] == one[name] == want


def test_each_process_reads_its_own_rows_and_puts_them_on_its_devices(
  told: list[dict[str, Any]],
) -> None:
  whole = np.arange(16).reshape(2, 8)
  # Which columns of a microbatch each of the eight devices holds, in their order.
  layouts = {
    "data:8": [[i] for i in range(8)],
    "stage:2,data:4": [[2 * (i % 4), 2 * (i % 4) + 1] for i in range(8)],
    "data:2,stage:4": [list(range(4 * (i % 2), 4 * (i % 2) + 4)) for i in range(8)],
    "data:2,tensor:4": [list(range(4 * (i // 4), 4 * (i // 4) + 4)) for i in range(8)],
  }
  for text, held in layouts.items():
    for process, found in enumerate(told):
      rows, shards = found[text]
      own = held[4 * process : 4 * process + 4]
      columns = sorted({column for each in own for column in each})
      assert rows == whole[:, columns].ravel().tolist()
      assert sorted(shards) == [[i, whole[:, each].tolist()] for i, each in enumerate(own)]


def test_a_process_without_devices_in_the_mesh_is_named(told: list[dict[str, Any]]) -> None:
  want = "AgreedError process 1: none of its 4 devices is of process 1; let it have all 8 devices"
  assert told[0]["few"] == told[1]["few"] == want


def test_only_process_0_shows_what_all_have(capsys: pytest.CaptureFixture[str]) -> None:
  from jaxpipe.training.flags.flags import exit_with_error

  for process, lines in ((0, 1), (3, 0)):
    with pytest.raises(SystemExit, match="2"):
      exit_with_error(AgreedError("wrong", process))
    assert capsys.readouterr().err.count("wrong") == lines


# Whole runs


def command(config: Config, count: int, devices: int = 4) -> list[str]:
  flags = [show_flag(name, value) for name, value in config.to_dict().items() if name != "prompt"]
  launcher = [str(ROOT / "launch" / "local.sh"), f"--devices={devices}", f"--processes={count}"]
  return [*launcher, str(ROOT / "experiments" / "lm.py"), *flags]


def run(config: Config, *processes: int) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    command(config, *processes),
    env=environment(),
    text=True,
    capture_output=True,
    timeout=300,
    check=False,
  )


# The last batch of a validation is padded, in rows that another process has.
# Each half of the devices has half of the rows; chunks change the order of a checkpoint's layers.
RUN: dict[str, Any] = {
  "steps": 6,
  "mesh": "data:2,stage:2",
  "schedule": "interleaved-1f1b",
  "chunks": 2,
  "microbatches": 2,
  "batch_size": 8,
  "unroll": "none",
  "layers": 4,
  "width": 8,
  "validate_every": 3,
  "checkpoint_every": 3,
}


def numbers(folder: Path) -> list[tuple[float, ...]]:
  """What each step computed, without what the clock says."""
  records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
  assert [record["step"] for record in records] == list(range(len(records)))
  names = ("loss", "grad_norm", "learning_rate", "validation_loss")
  return [tuple(record[name] for name in names) for record in records]


@pytest.mark.slow
@pytest.mark.sampled("count", [2, 4], 1)
def test_any_number_of_processes_gives_the_same_curve_and_resumes_on_one(
  tmp_path: Path, make_config: MakeConfig, count: int
) -> None:
  """Bit for bit; with four, pairs of processes have the same rows."""
  alone, several = tmp_path / "alone", tmp_path / "several"
  for folder, processes_of_it in ((alone, 1), (several, count)):
    folder.mkdir()
    finished = run(make_config(folder, **RUN), processes_of_it)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("step 5  loss") == 1
  want = numbers(alone)
  assert len(want) == 6 and numbers(several) == want
  # The checkpoint of all of them, read by one that holds every stage.
  shutil.rmtree(several / "run" / "checkpoints" / "6")
  finished = run(make_config(several, **RUN), 1)
  assert finished.returncode == 0, finished.stderr
  assert "after 3 steps" in finished.stdout
  assert numbers(several) == want


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(
  tmp_path: Path, make_config: MakeConfig
) -> None:
  flags = dict(RUN, steps=2000, checkpoint_every=0, validate_every=0, mesh="stage:2")
  flags |= {"schedule": "1f1b", "chunks": 0, "layers": 2}
  config = make_config(tmp_path, **flags)
  where = f"--coordinator={HERE}:{free_port()}"
  script = command(config, 1)[3:]
  started = [
    subprocess.Popen(
      [sys.executable, "-u", *script, where, f"--process_id={i}", "--num_processes=2"],
      env=environment(1),
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    for i in range(2)
  ]
  first, second = started
  assert first.stdout is not None
  assert any(line.startswith("step    2 ") for line in first.stdout)
  second.send_signal(signal.SIGTERM)
  said, _ = first.communicate(timeout=120)
  silent, _ = second.communicate(timeout=120)
  assert [process.returncode for process in started] == [128 + signal.SIGTERM] * 2
  (done,) = re.findall(r"SIGTERM: saved after (\d+) steps", said)
  assert "saved" not in silent
  assert len(numbers(tmp_path)) == int(done)
  assert (tmp_path / "run" / "checkpoints" / done / "params").is_dir()


@pytest.mark.sampled(
  "flags, words",
  [
    (["--stpes=3"], "did you mean --steps?"),
    (["--steps=0"], "--steps=0 is not a count"),
    (["--sample"], "--sample is for one process"),
  ],
  1,
)
@pytest.mark.slow
def test_what_is_wrong_in_all_processes_is_said_once(
  tmp_path: Path, make_config: MakeConfig, flags: list[str], words: str
) -> None:
  done = subprocess.run(
    [*command(make_config(tmp_path), 2), *flags],
    env=environment(),
    text=True,
    capture_output=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1 and words in done.stderr
  assert not (tmp_path / "run").exists()
