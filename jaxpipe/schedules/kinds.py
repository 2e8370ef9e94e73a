"""Kinds of action: one table that says everything about each of them.

An action is written with a letter between two numbers, such as `3F0`. The letters are PyTorch's, so
that the CSV files of `torch.distributed.pipelining` are ours too; R, S, T, G, X, Y and U are
additions. Zero Bubble (Qi et al., 2023, arXiv:2401.10241) splits the backward pass: its B is our
`I`, its W our `W`; our `B` is the fused pair.

The tables of other modules (what the walk waits for, peaks, colours, the integers of the tick
table, the executor's name scopes) are all derived from the rows below. A new kind is one row, plus
the code that gives it a rule of its own: what it waits for (`walk`), how long it takes (`costs`),
what is legal (`checks`). One that devices run also needs a code here, its buffers and columns in
`pipeline/table/lower.py`, a step of the tick in `pipeline/device/device.py` with the protocol that
it calls, and its share of `pipeline/costs/`.
"""

import dataclasses
import enum
from typing import Self


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindInfo:
  """The facts about one kind of action.

  Attributes:
    meaning: what a device does in such an action, in one line.
    legend: its name in the legend of a picture.
    colour: red, green and blue of its boxes in a picture, each from 0 to 1.
    before: what the number before the letter counts.
    after: what the number after the letter counts.
    products: letters of the results that the action makes; empty stands for its own letter alone.
    on_stage: whether it is a pass through a stage: it must run on a device that holds the stage.
    necessary: whether it does work that no training step may leave out: every stage and microbatch
      has each product of the necessary kinds exactly once.
    awaited: whether other actions wait for the product with its letter.
    times: letters of those of F, I and W whose durations on the same stage add up to its own, as
      long as the costs say nothing else; empty where it takes no time, None where its duration has
      nothing to do with a stage's.
    chunks_held: change in the number of chunks whose activations its device holds.
    pending_weight_grads: change in the number of chunks whose I is done and whose W is not.
    code: its integer in the executor's tick table, 1 or more, different for every kind; None where
      the executor does not run it.
  """

  meaning: str
  legend: str
  colour: tuple[float, float, float]
  before: str = "stage"
  after: str = "microbatch"
  products: str = ""
  on_stage: bool = False
  necessary: bool = False
  awaited: bool = False
  times: str | None = None
  chunks_held: int = 0
  pending_weight_grads: int = 0
  code: int | None = None


# The order of the rows is the order of legends, of error messages and of every derived table. Hues
# are those of the Zero Bubble papers (forward blue, input gradient teal, weight gradient green),
# the fused backward in Megatron's green, which differ in lightness too for readers who see no hue.
class Kind(enum.StrEnum):
  """The kind of an action: its value is its letter, `info` holds the facts about it."""

  F = (
    "F",
    KindInfo(
      meaning="forward",
      legend="forward",
      colour=(0.36, 0.55, 0.90),
      on_stage=True,
      necessary=True,
      awaited=True,
      times="F",
      chunks_held=1,
      code=1,
    ),
  )
  R = (
    "R",
    KindInfo(
      meaning="recompute what a rematerialized forward dropped",
      legend="recompute",
      colour=(0.95, 0.76, 0.36),
      on_stage=True,
      times="F",
      code=2,
    ),
  )
  I = (
    "I",
    KindInfo(
      meaning="gradient of the stage's input",
      legend="input gradient",
      colour=(0.45, 0.83, 0.86),
      on_stage=True,
      necessary=True,
      awaited=True,
      times="I",
      pending_weight_grads=1,
      code=4,
    ),
  )
  # A chunk is held until its weight gradient is done, for W needs the layer inputs that F kept.
  W = (
    "W",
    KindInfo(
      meaning="gradient of the stage's weights",
      legend="weight gradient",
      colour=(0.42, 0.70, 0.36),
      on_stage=True,
      necessary=True,
      times="W",
      chunks_held=-1,
      pending_weight_grads=-1,
      code=5,
    ),
  )
  # Everything that waits, or that must happen exactly once, is stated in terms of products, so that
  # a fused B needs no special case elsewhere. It never leaves a weight gradient pending.
  B = (
    "B",
    KindInfo(
      meaning="I and W in one",
      legend="backward",
      colour=(0.60, 0.80, 0.50),
      products="IW",
      on_stage=True,
      necessary=True,
      times="IW",
      chunks_held=-1,
      code=3,
    ),
  )
  S = (
    "S",
    KindInfo(
      meaning="output layer on one shard of the vocabulary",
      legend="vocabulary, forward",
      colour=(0.86, 0.47, 0.60),
      before="shard of the vocabulary, which is the device's number",
      awaited=True,
      code=6,
    ),
  )
  T = (
    "T",
    KindInfo(
      meaning="weight gradient of S (with two barriers: all of its gradients)",
      legend="vocabulary, backward",
      colour=(0.93, 0.68, 0.76),
      before="shard of the vocabulary, which is the device's number",
      awaited=True,
      code=7,
    ),
  )
  # Moving weights is not a layer's work: it takes no time unless costs say so.
  G = (
    "G",
    KindInfo(
      meaning="gather a stage's weights",
      legend="gather weights",
      colour=(0.55, 0.45, 0.70),
      after="first microbatch of the unit that needs the weights",
      times="",
      code=8,
    ),
  )
  # The executor's gathered weights end with the last action that reads them, so X needs no code.
  X = (
    "X",
    KindInfo(
      meaning="release gathered weights",
      legend="release weights",
      colour=(0.75, 0.70, 0.82),
      after="first microbatch of the unit that needs the weights",
      times="",
    ),
  )
  Y = (
    "Y",
    KindInfo(
      meaning="filler: a frozen layer of the next step",
      legend="filler",
      colour=(0.72, 0.60, 0.45),
      before="frozen layer",
      after="microbatch of the next step",
      awaited=True,
    ),
  )
  U = (
    "U",
    KindInfo(
      meaning="optimizer",
      legend="optimizer",
      colour=(0.45, 0.45, 0.45),
      after="0: step, 1: validate the step before",
      awaited=True,
    ),
  )

  _value_: str
  info: KindInfo

  # A default, because to type checkers the look-up `Kind("F")` is a call of this method. Enum never
  # calls it for that, so that a row without facts fails at import.
  def __new__(cls, letter: str, info: KindInfo | None = None) -> Self:
    """Makes the member of one row, which as text and as a value is its letter."""
    assert info is not None
    kind = str.__new__(cls, letter)
    kind._value_ = letter
    kind.info = info
    return kind

  # Enum's own hash is a Python function, and kinds are looked up several times per action.
  __hash__ = str.__hash__


# What each kind makes, itself except for B, which makes what I and W make.
PRODUCTS: dict[Kind, tuple[Kind, ...]] = {
  kind: tuple(Kind(letter) for letter in kind.info.products or kind.value) for kind in Kind
}
# The passes through a stage: they must run where the stage's weights are.
STAGE_KINDS = frozenset(kind for kind in Kind if kind.info.on_stage)
# What every stage and microbatch must have exactly once: F, I and W, in this order.
REQUIRED: tuple[Kind, ...] = tuple(
  dict.fromkeys(product for kind in Kind if kind.info.necessary for product in PRODUCTS[kind])
)
# Change in the chunks that a device holds, for the kinds that change it.
CHUNKS_HELD: dict[Kind, int] = {
  kind: kind.info.chunks_held for kind in Kind if kind.info.chunks_held
}
