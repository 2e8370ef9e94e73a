"""The metrics file: each step once, floats exact, whatever a kill left."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxpipe.training.chips import peak_flops
from jaxpipe.training.flags.errors import ConfigError
from jaxpipe.training.loop.journal import Journal
from jaxpipe.training.loop.metrics import MetricsWriter, Record, read_records
from jaxpipe.training.loop.plots import draw_loss, running_mean
from jaxpipe.training.loop.step import StepResult


def record(step: int, loss: float = 0.1) -> Record:
  return Record(
    step=step,
    loss=loss,
    grad_norm=1 / 3,
    learning_rate=1e-3,
    tokens_per_second=2 / 3,
    step_seconds=0.1 + 0.2,
  )


def write(folder: Path, start: int, stop: int, loss: float = 0.1) -> list[int]:
  with MetricsWriter(folder / "metrics.jsonl", folder, start) as writer:
    for step in range(start, stop):
      writer.write(record(step, loss))
    writer.sync()
  return [line["step"] for line in read_records(folder / "metrics.jsonl")]


@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 5, "loss": 1.2'])
def test_each_step_stands_once_after_a_resume(tmp_path: Path, torn: bytes) -> None:
  write(tmp_path, 0, 5)
  with (tmp_path / "metrics.jsonl").open("ab") as file:
    file.write(torn)
  assert write(tmp_path, 3, 7, loss=0.7) == list(range(7))
  losses = [line["loss"] for line in read_records(tmp_path / "metrics.jsonl")]
  assert losses == [0.1] * 3 + [0.7] * 4


def test_floats_round_trip_and_fields_are_the_contract(tmp_path: Path) -> None:
  loss = math.nextafter(2.5, 3)
  write(tmp_path, 0, 1, loss)
  line = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert list(line) == [
    *("step", "loss", "grad_norm", "learning_rate"),
    *("tokens_per_second", "step_seconds", "validation_loss"),
  ]
  assert line["loss"] == loss and line["validation_loss"] is None


def test_steps_are_written_one_late_and_none_is_lost() -> None:
  written: list[Record] = []
  journal = Journal(64, written.append)
  for k in range(3):
    journal.add(k, StepResult(k, 0, 0, {}))  # type: ignore[arg-type]
    assert len(written) == k
  journal.flush(lambda: {"loss": 1.5, "accuracy": 0.5})
  journal.flush()
  assert [(r.step, r.loss, r.validation_loss) for r in written] == [
    (0, 0, None),
    (1, 1, None),
    (2, 2, 1.5),
  ]
  assert [dict(r.more) for r in written] == [{}, {}, {"validation_accuracy": 0.5}]
  assert all(r.tokens_per_second == 64 / r.step_seconds for r in written)


def test_steps_that_train_on_nothing_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
  journal = Journal(None, lambda record: None)
  for step, (loss, norm) in enumerate([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]):
    journal.add(step, StepResult(loss, norm, 0.1, {}))  # type: ignore[arg-type]
  journal.flush()
  lines = capsys.readouterr().out.splitlines()
  assert [line.partition(":")[0] for line in lines] == ["step 0", "step 3"]
  assert lines[1].endswith("2 such steps so far")


class Clock:
  """A host and a device in made-up seconds, so that no test waits."""

  def __init__(self) -> None:
    self.now = 100.0
    self.free = 0.0  # when the device has done all that was dispatched

  def __call__(self) -> float:
    return self.now

  def dispatch(self, seconds: float, synchronous: bool) -> StepResult:
    done = self.free = max(self.now, self.free) + seconds
    if synchronous:
      self.now = done
    clock = self

    class Number:
      def is_ready(self) -> bool:
        return clock.now >= done

      def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        clock.now = max(clock.now, done)
        return np.float32(1)[...]

    return StepResult(Number(), Number(), Number(), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_steps_are_timed_by_when_they_ran(synchronous: bool, told: bool, every: int) -> None:
  """Where dispatch waits for the step, it was timed from when dispatch had returned."""
  written: list[Record] = []
  clock = Clock()
  journal = Journal(100, written.append, clock)
  seconds = [0.05, 0.05, 0.2, 0.05, 0.05, 0.125, 0.05]
  for k, lasts in enumerate(seconds):
    began = clock() if told else None
    journal.add(k, clock.dispatch(lasts, synchronous), began)
    if (k + 1) % every == 0:
      journal.flush()
      if told:
        clock.now += 3.0  # a checkpoint, which is no step's time
  journal.flush()
  assert [r.step_seconds for r in written] == pytest.approx(seconds)
  assert [r.tokens_per_second for r in written] == pytest.approx([100 / s for s in seconds])


def test_loss_curve_is_drawn(tmp_path: Path) -> None:
  write(tmp_path, 0, 3)
  draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert running_mean([3.0, 3.0]).tolist() == pytest.approx([3.0, 3.0])
  assert running_mean([5.0, 1.0, 0.0]).tolist() == pytest.approx([5.0, 2.0, 0.0])


def test_unknown_devices_have_no_peak() -> None:
  assert peak_flops("TPU v4") == 275e12
  assert peak_flops("TPU v4 lite") is None


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0\0garbage\n"])
def test_what_a_power_cut_left_of_the_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
  write(tmp_path, 0, 3)
  file = tmp_path / "metrics.jsonl"
  file.write_bytes(file.read_bytes() + torn)
  write(tmp_path, 3, 4)
  assert [record["step"] for record in read_records(file)] == [0, 1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
  write(tmp_path, 0, 2)
  file = tmp_path / "metrics.jsonl"
  file.write_bytes(b"garbage\n" + file.read_bytes())
  with pytest.raises(ConfigError, match=r"metrics.jsonl: line 1 is damaged"):
    list(read_records(file))
