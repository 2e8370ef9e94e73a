"""Whole tiny runs: killed, interrupted, moved to another mesh, and still the same numbers."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxpipe.training.flags.settings import show_flag
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.run import build_run
from jaxpipe.training.loop.checkpoint import Checkpoints
from jaxpipe.training.loop.interrupt import Interrupt
from jaxpipe.training.loop.loop import train
from jaxpipe.training.loop.metrics import MetricsWriter, Record

ROOT = Path(__file__).parents[3]
STEPS = 50
# Dropout on: a resumed run must also draw what the uninterrupted one drew.
RUN: dict[str, Any] = {"steps": STEPS, "dropout": 0.1, "validate_every": 20}

MakeConfig = Callable[..., Config]


def read(folder: Path) -> list[dict[str, Any]]:
  lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def numbers(folder: Path, name: str = "loss") -> list[float]:
  """One value a step, each step once and in order."""
  records = read(folder)
  assert [record["step"] for record in records] == list(range(len(records)))
  return [record[name] for record in records]


def saved(folder: Path) -> int | None:
  return Checkpoints(folder / "run" / "checkpoints", read_only=True).newest


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
  """The folder of a run that nobody disturbed, at stage:4 with 1F1B."""
  folder = tmp_path_factory.mktemp("uninterrupted")
  assert train(build_run(make_config(folder, **RUN, profile_steps="3:5")).begin()) == 0
  return folder


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
  """`interrupt_after(step, number)`: sends the signal when that step is written."""
  write = MetricsWriter.write

  def arm(step: int, number: int) -> None:
    def writing(self: MetricsWriter, record: Record) -> None:
      write(self, record)
      if record.step == step:
        signal.raise_signal(number)

    monkeypatch.setattr(MetricsWriter, "write", writing)

  return arm


def test_a_run_learns_and_leaves_everything(uninterrupted: Path) -> None:
  losses = numbers(uninterrupted)
  assert len(losses) == STEPS and losses[0] > 5 and losses[-1] < 2.5
  validated = {r["step"]: r["validation_loss"] for r in read(uninterrupted) if r["validation_loss"]}
  assert list(validated) == [19, 39, 49] and validated[49] < validated[19]
  run = uninterrupted / "run"
  for plot in ("timetable.png", "loss.png"):
    assert (run / plot).read_bytes().startswith(b"\x89PNG")
  assert list(run.glob("events.out.tfevents.*"))
  assert list(run.rglob("perfetto_trace.json.gz"))


def test_a_finished_run_says_so(
  uninterrupted: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
  before = (uninterrupted / "run" / "metrics.jsonl").read_bytes()
  assert train(build_run(make_config(uninterrupted, **RUN)).begin()) == 0
  assert f"finished, {STEPS} steps of --steps={STEPS}" in capsys.readouterr().out
  assert (uninterrupted / "run" / "metrics.jsonl").read_bytes() == before


def test_one_stage_gives_the_same_losses(
  tmp_path: Path, uninterrupted: Path, make_config: MakeConfig
) -> None:
  # In a program of another shape, too.
  options = {**RUN, "validate_every": 0, "mesh": "stage:1", "unroll": "auto"}
  train(build_run(make_config(tmp_path, **options)).begin())
  np.testing.assert_allclose(numbers(tmp_path), numbers(uninterrupted), rtol=1e-5)


def test_killed_runs_go_on_bit_for_bit(
  tmp_path: Path,
  uninterrupted: Path,
  make_config: MakeConfig,
  sample_grid: Callable[[Sequence[int], int], list[int]],
) -> None:
  config = make_config(tmp_path, **RUN, checkpoint_every=3, text=str(uninterrupted / "text.txt"))
  (at,) = sample_grid(range(10, STEPS - 1), 1)
  with start(config) as process:
    assert wait_for(process, f"step {at:2d} ")
    process.kill()
  assert process.returncode == -signal.SIGKILL
  # What a kill in the middle of a line leaves.
  with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
    file.write(b'{"step": 99, "lo')
  with start(config) as process:
    assert wait_for(process, "resuming from ")
    process.communicate()
  assert process.returncode == 0
  assert numbers(tmp_path) == numbers(uninterrupted)
  assert numbers(tmp_path, "validation_loss") == numbers(uninterrupted, "validation_loss")


def start(config: Config) -> subprocess.Popen[str]:
  flags = [show_flag(name, value) for name, value in config.to_dict().items() if name != "prompt"]
  command = [
    sys.executable,
    "-u",
    "-c",
    "import sys; sys.path.insert(0, sys.argv.pop(1));" + SCRIPT,
  ]
  return subprocess.Popen([*command, str(ROOT), *flags], stdout=subprocess.PIPE, text=True)


SCRIPT = """
from jaxpipe.training.lm.command import run_lm
from jaxpipe.training.lm.config import Config
run_lm(Config())
"""


def wait_for(process: subprocess.Popen[str], beginning: str) -> bool:
  """Reads what the process prints until a line begins so; False if it ends before."""
  assert process.stdout is not None
  return any(line.startswith(beginning) for line in process.stdout)


@pytest.mark.sampled(
  "number, changes",
  [
    (signal.SIGINT, {"mesh": "stage:2", "schedule": "gpipe"}),
    (signal.SIGTERM, {"mesh": "stage:2,data:2", "microbatches": 2, "backward": "split"}),
  ],
  1,
)
def test_interrupted_runs_save_and_may_move(
  tmp_path: Path,
  uninterrupted: Path,
  make_config: MakeConfig,
  interrupt_after: Callable[[int, int], None],
  capsys: pytest.CaptureFixture[str],
  number: int,
  changes: dict[str, Any],
) -> None:
  # Dropout masks are keyed by microbatch, so only runs with equal M draw the same ones.
  run = {**RUN, "dropout": 0.1 if "microbatches" not in changes else 0.0}
  interrupt_after(20, number)
  assert train(build_run(make_config(tmp_path, **run)).begin()) == 128 + number
  done = saved(tmp_path)
  assert done in (21, 22) and len(numbers(tmp_path)) == done
  assert f"saved after {done} steps; the same command resumes" in capsys.readouterr().out
  before = numbers(tmp_path)
  train(build_run(make_config(tmp_path, **{**run, **changes})).begin())
  losses = numbers(tmp_path)
  assert losses[:done] == before and len(losses) == STEPS
  if run == RUN:
    np.testing.assert_allclose(losses, numbers(uninterrupted), rtol=1e-5)


def test_second_signal_ends_at_once() -> None:
  with Interrupt() as interrupt:
    assert interrupt.received is None
    signal.raise_signal(signal.SIGTERM)
    assert interrupt.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_with_experts_moves_between_meshes_that_cut_everything(
  tmp_path: Path, make_config: MakeConfig, interrupt_after: Callable[[int, int], None]
) -> None:
  """Parameters, moments and masks are those of the run on one device."""
  run = dict(steps=6, dropout=0.1, validate_every=0, experts=4, kv_heads=2, batch_size=8)
  run |= {"layers": 2, "chunks": 1}
  alone, moved = tmp_path / "alone", tmp_path / "moved"
  for folder in (alone, moved):
    folder.mkdir()
  assert train(build_run(make_config(alone, **run, mesh="stage:1")).begin()) == 0
  interrupt_after(2, signal.SIGTERM)
  first = make_config(moved, **run, mesh="stage:2,expert:2,tensor:2", sequence_parallel=True)
  assert train(build_run(first).begin()) == 128 + signal.SIGTERM
  second = make_config(moved, **run, mesh="stage:2,sequence:2,fsdp:2", schedule="zeropp")
  assert train(build_run(second).begin()) == 0
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(numbers(moved, name), numbers(alone, name), rtol=1e-5)
