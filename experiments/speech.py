"""Deep Speech 2, small, on strings of spoken digits: convolutions, recurrences both ways, CTC.

    ./launch/local.sh experiments/speech.py

0.36M parameters over 4 CPU devices whose stages are unlike, all with BatchNorm; 400 steps of 32
utterances of up to four digits, put together from clips that eSpeak NG has spoken (see
data/spoken_digits). Expected on two cores: about 3 minutes. The character error rate is that of
twelve speakers that training never heard; README has what was seen. The same command resumes;
`--help` lists the flags.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import jax
import numpy as np

from jaxpipe.data.experiments.log_mel import BANDS
from jaxpipe.data.experiments.spoken_digits import DIGITS, load_spoken_digits
from jaxpipe.models.speech.ctc import edit_distances
from jaxpipe.models.speech.deep_speech import DeepSpeechConfig, deep_speech
from jaxpipe.training.command.task import Baseline, Task, TaskConfig
from jaxpipe.training.command.task_run import run_task
from jaxpipe.training.flags.settings import same

CLIPS = pathlib.Path(__file__).resolve().parents[1] / "data" / "spoken_digits" / "digits.npz"
MEASURED = 8  # batches of one validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechRun(TaskConfig):
  """The flags: those of every run, of the utterances and of the model."""

  channels: int = same(16, "channels C of the convolutions")
  width: int = same(96, "width D of the recurrent layers, each way")
  recurrent: int = same(3, "recurrent layers")
  dropout: float = same(0.1, "share of what a recurrent layer takes that is dropped")
  frames: int = same(160, "frames T of 10 ms that an utterance has")


def build(config: SpeechRun) -> Task:
  """Builds the task: the clips, the network and the best constant answer."""
  data = load_spoken_digits(CLIPS)
  model = DeepSpeechConfig(
    bands=BANDS,
    symbols=DIGITS + 1,
    channels=config.channels,
    width=config.width,
    recurrent=config.recurrent,
    dropout=config.dropout,
  )
  batch = functools.partial(data.batch, config.batch_size, frames=config.frames)
  held_out = [batch(0, step, held_out=True) for step in range(MEASURED)]
  constant = best_constant(np.concatenate([one["labels"] for one in held_out]))
  return Task(
    stack=deep_speech(model),
    batches=lambda step: batch(config.seed, step),
    validation=held_out,
    summarize=lambda loss, metrics, weight: {"error_rate": metrics["errors"] / metrics["said"]},
    baseline=Baseline(name="the best constant answer", metrics={"error_rate": constant}),
    identity={"clips": data.checksum},
    data_line=f"data: {len(data.clips)} speakers of {DIGITS} digits, the last 12 held out",
  )


def best_constant(labels: Any) -> float:
  """Returns the character error rate of the one answer that is least wrong for all utterances.

  Answers of one and of two digits are tried.

  Args:
    labels: int [n, longest], digits plus one of each utterance; 0 fills up.
  """
  digits = range(1, DIGITS + 1)
  answers = [*itertools.product(digits, repeat=1), *itertools.product(digits, repeat=2)]
  answers = [answer + (0,) * (2 - len(answer)) for answer in answers]
  distances = jax.jit(jax.vmap(edit_distances, in_axes=(0, None)))
  repeated = np.repeat(np.array(answers)[:, None], len(labels), axis=1)
  return float(distances(repeated, labels).sum(axis=1).min() / (labels > 0).sum())


DEFAULTS = SpeechRun(
  run_dir="runs/speech",
  batch_size=32,
  steps=400,
  learning_rate=3e-3,
  warmup_steps=40,
  weight_decay=0.01,
  validate_every=50,
  checkpoint_every=100,
)

if __name__ == "__main__":
  run_task(DEFAULTS, build)
