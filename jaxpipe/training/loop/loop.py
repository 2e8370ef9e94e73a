"""The training loop: steps, and between them what is due (validation, checkpoint, trace, end).

    for each step k:  trace on or off?   dispatch step k   write the record of step k - 1
                      signal received?   validate?         save?

What is trained is a `Run`; what it writes goes through the other modules of this folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

from jaxpipe.pipeline.batch import Microbatches
from jaxpipe.schedules import draw_figure, simulate
from jaxpipe.training.loop.checkpoint import Checkpoints
from jaxpipe.training.loop.interrupt import Interrupt
from jaxpipe.training.loop.journal import Journal
from jaxpipe.training.loop.metrics import MetricsWriter, Record
from jaxpipe.training.loop.plots import draw_loss
from jaxpipe.training.loop.profiler import Profiler
from jaxpipe.training.loop.report import Screen, StepLine, describe
from jaxpipe.training.loop.step import StepResult, compile_step
from jaxpipe.training.plan.run import Run
from jaxpipe.training.plan.state import TrainState, canonical_shapes, create_state
from jaxpipe.training.processes.processes import Signals, from_first, is_first, say

Step = Callable[[TrainState, Microbatches], tuple[TrainState, StepResult]]


def train(run: Run) -> int:
  """Trains from the newest checkpoint of the run directory, or from the start, to the last step.

  Args:
    run: built, checked, and with its run directory made.

  Returns:
    The exit status, equal in all processes: 0, or 128 plus the signal that ended the run early.
  """
  checkpoints = Checkpoints(run.folder.checkpoints)
  start, steps = from_first(checkpoints.newest) or 0, run.config.steps
  if start >= steps:
    say(f"{run.folder.path}: finished, {start} steps of --steps={steps}; nothing to train")
    _draw(run)  # the run may have been killed between its last step and the drawing
    checkpoints.close()
    return 0
  if is_first():
    print(describe(run), flush=True)
    draw_figure(simulate(run.schedule), run.folder.path / "timetable.png")
  state = _first_state(run, checkpoints, start)
  began = time.perf_counter()
  # Ahead of the first step: its time is no step's, and nothing can compile it again.
  step = compile_step(run, state)
  say(f"compiled in {time.perf_counter() - began:.1f} s")
  # Left in reverse: the trace and the signals first, then the bar, the checkpoints, the metrics.
  with contextlib.ExitStack() as stack:
    metrics = stack.enter_context(_metrics(run, start))
    stack.callback(checkpoints.close)
    screen = stack.enter_context(Screen(start, steps))
    interrupt = stack.enter_context(Interrupt())
    profiler = Profiler(run.config.profile_range() if is_first() else range(0), run.folder.profile)
    stack.callback(profiler.stop)
    signals = Signals(run.mesh)
    loop = Loop(run, step, checkpoints, metrics, screen, interrupt, signals, profiler)
    done = loop.run(state, start)
  _draw(run)
  if done < steps and signals.received is not None:
    say(f"{signals.received.name}: saved after {done} steps; the same command resumes")
    return 128 + signals.received
  return 0


def _draw(run: Run) -> None:
  """Draws the loss curve, in process 0."""
  if is_first():
    units = (run.loss_unit, run.validation_unit)
    draw_loss(run.folder.metrics, run.folder.loss_png, *units)


def _metrics(run: Run, start: int) -> MetricsWriter | contextlib.nullcontext[None]:
  """Opens the metrics for the steps from `start` on; None in processes other than the first."""
  if not is_first():
    return contextlib.nullcontext()
  return MetricsWriter(run.folder.metrics, run.folder.path, start)


def _first_state(run: Run, checkpoints: Checkpoints, start: int) -> TrainState:
  """Restores the checkpoint of step `start`, or makes a fresh state for step 0."""
  if not start:
    return create_state(
      run.stack,
      run.optimizer,
      run.config.seed,
      run.batch_shapes,
      run.schedule,
      run.mesh,
      averages=run.config.ema > 0,
      values=run.first_values,
    )
  say(f"resuming from {run.folder.path} after {start} steps")
  how = run.stack, run.schedule, run.mesh
  return checkpoints.restore(start, canonical_shapes(run.state_shapes(), *how), *how)


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
  """The loop over the steps of a run; `train` opens and closes what it works with.

  Attributes:
    job: the run.
    step: the compiled step, `(state, batch) -> (state, StepResult)`; it donates the given state.
    checkpoints: where states are saved.
    metrics: where records are written; None in processes other than the first.
    screen: prints a line for each step.
    interrupt: the signal that this process has received.
    signals: the signal that all processes have agreed to end by.
    profiler: starts and stops the trace of the steps that `--profile_steps` names.
  """

  job: Run
  step: Step
  checkpoints: Checkpoints
  metrics: MetricsWriter | None
  screen: Screen
  interrupt: Interrupt
  signals: Signals
  profiler: Profiler

  def run(self, state: TrainState, start: int) -> int:
    """Runs the steps from `start` on.

    Args:
      state: before step `start`, placed; it is donated.
      start: the first step.

    Returns:
      How many steps the run has done in total, those before `start` included.
    """
    config = self.job.config
    validate = self.job.validator()
    journal = Journal(self.job.tokens, self._writer())
    with self.job.batches(start) as batches:
      for k in range(start, config.steps):
        if self.profiler.is_edge(k):
          # No step may be under way, or the trace would hold a part of it.
          journal.flush()
          self.profiler.before(k)
        batch = self.job.rows.put(next(batches))
        began = time.perf_counter()
        state, result = self.step(state, batch)
        journal.add(k, result, began)
        done = k + 1
        # Looked at after the dispatch: a signal during step k ends the run with step k in it.
        self.signals.agree(self.interrupt.received)
        last = done == config.steps or self.signals.received is not None
        validating = done == config.steps or _due(done, config.validate_every)
        saving = last or _due(done, config.checkpoint_every)
        if validating or saving:
          # The line of a step holds its validation loss, and stands before its checkpoint does.
          journal.flush(functools.partial(validate, state) if validating else None)
        if saving:
          self._save(state)
        if last:
          break
    return done

  def _writer(self) -> Callable[[Record], None]:
    """Returns a function that writes a record to the metrics and prints it."""
    line = StepLine(self.job)

    def write(record: Record) -> None:
      if self.metrics is None:
        return
      self.metrics.write(record)
      self.screen.line(line(record))
      self.screen.advance(record.step + 1)

    return write

  def _save(self, state: TrainState) -> None:
    """Starts writing a checkpoint of the state."""
    # Metrics first: a checkpoint ahead of them would leave a gap that no resumed run fills.
    if self.metrics is not None:
      self.metrics.sync()
    config, data = self.job.config, self.job.record.data
    meta: dict[str, Any] = {"seed": config.seed, "config": config.to_dict(), "data": data}
    self.checkpoints.save(state, self.job.stack, self.job.schedule, self.job.mesh, meta)


def _due(done: int, every: int) -> bool:
  """Whether something that is to be done every so many steps is due after `done` of them."""
  return every > 0 and done % every == 0
