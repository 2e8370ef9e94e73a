"""Writes docs/partition.md: what cutting layers by the simulated step gains, and what it takes.

.venv/bin/python docs/make/partition.py

Takes about a minute on one core.
"""

from __future__ import annotations

import pathlib
import random
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from jaxpipe.schedules import simulate
from jaxpipe.schedules.partition import LayerCost, Plan, balanced, best, by_variance
from jaxpipe.schedules.partition.frozen import best_filled
from jaxpipe.schedules.partition.opposite import opposite

PAGE = pathlib.Path(__file__).parents[1] / "partition.md"
SEEDS = 3
# name, P, M, V, L
SHAPES = (
  ("1f1b", 4, 8, None, 24),
  ("1f1b", 8, 32, None, 50),
  ("gpipe", 8, 32, None, 50),
  ("zb-h1", 8, 32, None, 50),
  ("chimera", 8, 32, None, 50),
  ("interleaved-1f1b", 4, 8, 2, 24),
  ("interleaved-1f1b", 4, 16, 2, 50),
  ("interleaved-1f1b", 8, 32, 2, 50),
)


def uneven(seed: int, count: int) -> list[LayerCost]:
  """Layers of independent times, forwards from 50 to 400."""
  draw = random.Random(seed)
  layers = []
  for i in range(count):
    forward = draw.randint(50, 400)
    times = (
      forward,
      round(forward * draw.uniform(0.8, 1.3)),
      round(forward * draw.uniform(0.6, 1.1)),
    )
    layers.append(LayerCost(f"layer {i}", *times, draw.randint(1, 9), draw.randint(1, 9)))
  return layers


def language_model() -> list[LayerCost]:
  """An embedding, 48 equal blocks and a head as heavy as four of them, which must stay last."""
  blocks = [LayerCost(f"block {i}", 100, 105, 95, 120, 34, 2) for i in range(48)]
  ends = (LayerCost("embed", 2, 0, 20, 500, 2, 2), LayerCost("head", 400, 400, 400, 500, 60, 0))
  return [ends[0], *blocks, ends[1]]


def conv_net() -> list[LayerCost]:
  """Early layers hold activations, late ones parameters, as in image classifiers."""
  layers = []
  for i in range(32):
    depth, time_ = i // 8, 160 - 20 * (i // 8) + 30 * (i % 8 == 0)
    layers.append(
      LayerCost(f"layer {i}", time_, time_, time_, 4 * 4**depth, 256 // 4**depth, 64 // 2**depth)
    )
  return layers


def backbone(seed: int, count: int) -> list[LayerCost]:
  """A denoiser: layers of uneven time, F, I and W alike."""
  draw = random.Random(seed)
  times = [draw.randint(30, 120) for _ in range(count)]
  return [LayerCost(f"block {i}", t, t, t, 10, 5, 3) for i, t in enumerate(times)]


def encoders(work: float) -> list[LayerCost]:
  """A text encoder of 24 small layers and an image encoder of 9 long ones, `work` together."""
  shares = [10] * 24 + [120, 200, 260, 260, 200, 160, 120, 60, 60]
  return [
    LayerCost(f"frozen {i}", round(share * work / sum(shares))) for i, share in enumerate(shares)
  ]


def other_makespan(plan: Plan, rule) -> float:
  """What the partition of a rule takes under the same schedule."""
  schedule = plan.timeline.schedule
  return simulate(schedule, rule(plan.partition.layers, schedule.stages).costs(plan.hop)).makespan


def search_table() -> str:
  """One row per shape: gains, proofs and time."""
  rows = [
    "| schedule | P | M | V | L | saved of `uniform` | of `balanced` | of `by_variance` | proven |"
    " largest gap | CPU seconds |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for name, P, M, V, L in SHAPES:
    plans, seconds = [], []
    for seed in range(SEEDS):
      begin = time.process_time()
      plans.append(best(uneven(seed, L), name, devices=P, microbatches=M, chunks=V, hop=3))
      seconds.append(time.process_time() - begin)
      print(name, P, M, V, L, seed, plans[-1].proven, f"{seconds[-1]:.1f} s", flush=True)
    saved = [f"{statistics.mean(plan.gain for plan in plans):.1%}"]
    for rule in (balanced, by_variance):
      gains = [1 - plan.makespan / other_makespan(plan, rule) for plan in plans]
      saved.append(f"{statistics.mean(gains):.2%}")
    proven, gap = sum(plan.proven for plan in plans), max(plan.gap for plan in plans)
    rows.append(
      f"| {name} | {P} | {M} | {plans[0].timeline.schedule.chunks} | {L} | {' | '.join(saved)} |"
      f" {proven} of {SEEDS} | {gap:.1%} | {statistics.mean(seconds):.1f} |"
    )
  return "\n".join(rows)


def memory_table() -> str:
  """The conv net under ever lower limits."""
  rows = ["| limit | sizes | makespan | most held | |", "|---|---|---|---|---|"]
  layers = conv_net()
  free = best(layers, "1f1b", devices=4, microbatches=16)
  top = max(free.memory)
  for share in (None, 0.9, 0.75, 0.6, 0.45, 0.3):
    limit = None if share is None else int(share * top)
    try:
      plan = best(layers, "1f1b", devices=4, microbatches=16, memory_limit=limit)
    except ValueError as error:
      rows.append(f"| {limit} | | | | {error} |")
      break
    proof = "proven" if plan.proven else f"gap {plan.gap:.1%}"
    sizes = " ".join(map(str, plan.partition.sizes))
    rows.append(
      f"| {limit or 'none'} | {sizes} | {plan.makespan:,} | {max(plan.memory):,} | {proof} |"
    )
  return "\n".join(rows)


def frozen_table() -> str:
  """A denoiser with frozen encoders worth two fifths of it."""
  rows = [
    "| P | M | schedule | its bubble | filled | step | encoders first | saved |",
    "|---|---|---|---|---|---|---|---|",
  ]
  layers = backbone(0, 28)
  frozen = encoders(0.4 * sum(layer.time for layer in layers))
  for P, M in ((4, 4), (4, 8), (8, 8), (8, 16)):
    plans = [best(layers, name, devices=P, microbatches=M) for name in ("1f1b", "zb-h1")]
    for plan in plans:
      filled, _ = best_filled([plan], frozen, overhead=2)
      rows.append(
        f"| {P} | {M} | {plan.timeline.schedule.name} | {plan.timeline.bubble:.1%} |"
        f" {filled.bubble:.1%} (any filling {filled.least_bubble:.1%}) | {filled.makespan:,.0f} |"
        f" {filled.apart:,.0f} | {filled.gain:.1%} |"
      )
  return "\n".join(rows)


def opposite_table() -> str:
  """Two denoisers through the same devices."""
  rows = [
    "| P | M each | order | step | bubble | proven | one after the other, 1f1b | zb-h1 |",
    "|---|---|---|---|---|---|---|---|",
  ]
  first, second = backbone(1, 20), backbone(2, 16)
  for P, M in ((4, 8), (8, 16)):
    apart = [
      sum(best(model, name, devices=P, microbatches=M).makespan for model in (first, second))
      for name in ("1f1b", "zb-h1")
    ]
    for name in ("chimera", "dualpipe"):
      plan = opposite(first, second, devices=P, microbatches=M, schedule=name)
      rows.append(
        f"| {P} | {M} | {name} | {plan.makespan:,} | {plan.timeline.bubble:.1%} |"
        f" {'yes' if plan.proven else f'gap {plan.gap:.1%}'} | {apart[0]:,} | {apart[1]:,} |"
      )
  return "\n".join(rows)


TEXT = """\
# Cutting layers into stages

`jaxpipe.schedules.partition` cuts a list of layers into the stages of a schedule. It knows no JAX
and no model: a layer is a `LayerCost`, the times of its F, I and W for one microbatch, and the
bytes of its parameters, of the activations that it keeps and of what it hands on.

```python
from jaxpipe.schedules.partition import LayerCost, balanced, best

block = LayerCost("block", forward=3, input_grad=3, weight_grad=2, parameters=12, activations=5)
layers = [block] * 22
balanced(layers, 4).sizes  # a rule that looks at the layers alone
plan = best(layers, "1f1b", devices=4, microbatches=8, memory_limit=200)
plan.partition.sizes, plan.makespan, plan.proven, plan.gap, plan.gain
print(plan.report())
```

## Rules

`cut(layers, stages, method)` knows them by name; all are exact, by dynamic programming.

| method | what is least |
|---|---|
| `uniform` | nothing: the first L mod S stages have one layer more |
| `balanced` | the largest stage time; of such cuts, the variance |
| `variance` | the variance of the stage times (GPipe's) |
| `parameters` | the largest stage's parameters; of such cuts, the variance |
| `type:REGEX` | nothing: as many layers whose name matches in each stage (DeepSpeed's) |

## The shortest step

`best` minimises what the simulator says of the schedule, within each device's memory:

- *Time.* With every device's list fixed, the makespan is the longest path through the schedule's
  waits, so it is the largest of many linear functions of the stages' times,
  `max over paths of sum over stages of f F + i I + w W + hops`. For 1F1B and one stage per device
  the path that device d decides is `F, I and W of all stages + (M-1) (F + I + W) of stage d`.
- *Memory.* A device holds its stages' parameters and, at its own list's worst moment, the
  activations of `n` microbatches of each: linear as well. `memory_limit` bounds it.
- *Links.* A hop takes `hop`, and with `bandwidth` also the time of the partition's widest boundary.

Best-first branch and bound over where stages begin. A beginning's bound is its largest path, each
with the least that the stages to come can add to it, by dynamic programming; means of paths count
as paths. Partitions looked at add the path that decided them. Stages that no partition below the
best one can contain are struck out. When the lowest bound reaches the best value it is `proven`;
when `effort` is spent first, `gap` says how much shorter a step might still be. Effort is counted,
not timed, so all processes of a job find the same partition.

Schedules that plan around the costs (zb-auto, the V family, hanayo, ...) are planned anew for each
partition, under bounds that hold for every order; that is slow, so each counts as 100. Passing a
`Schedule` keeps its order.

{seeds} models a row; forwards from 50 to 400, I 0.8 to 1.3 and W 0.6 to 1.1 of that, hop 3:

{search}

Equal to every partition there is on 500 random cases, thirteen schedules, V up to 4, hops, limits
and fewer layers than stages: `./launch/test.sh tests/schedules/partition --whole-grid`.

A language model of 48 equal blocks, an embedding and a head that takes as long as four blocks, 1F1B
on 8 devices, 32 microbatches:

```
{report}
```

A network whose early layers hold activations and whose late ones hold parameters, 1F1B, P=4, M=16,
under ever lower limits:

{memory}

## Frozen layers in the bubbles

`frozen.fill(plan, encoders)` puts the encoders' work for the next step into a plan's bubbles
(DiffusionPipe: Tian et al., 2024), microbatch by microbatch and, where a layer is longer than a
bubble, piece by piece; `best_filled` does so for several plans and takes the shortest. What fits
nowhere stands at the end. Simulated only: the step does not run encoders. A backbone of 28 uneven
layers and 33 frozen ones that take two fifths of its time, each piece 2 longer than its share:

{frozen}

"Any filling" is what frozen work in that amount must leave idle. "Encoders first" runs them before
the backbone on all devices at once, without a bubble.

## Two backbones in opposite directions

`opposite.opposite(first, second, ...)` cuts the two models of a cascade over the same devices, one
running from the first device on and the other from the last. A bidirectional schedule's second
replica becomes the second model: stage P + s is its stage s, and `paths` says which microbatch
visits which. Both cuts are found together. Simulated, checked and drawn like any schedule; a step
with two models and two losses is not built.

{opposite}

Reproduce with `.venv/bin/python docs/make/partition.py` (it took {seconds:.0f} CPU seconds).
"""


def main() -> None:
  """Measures and writes the page."""
  begin = time.process_time()
  text = TEXT.format(
    seeds=SEEDS,
    search=search_table(),
    report=best(language_model(), "1f1b", devices=8, microbatches=32).report(),
    memory=memory_table(),
    frozen=frozen_table(),
    opposite=opposite_table(),
    seconds=time.process_time() - begin,
  )
  PAGE.write_text(text)
  print(text)


if __name__ == "__main__":
  main()
