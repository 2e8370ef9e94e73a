"""Writes a section of docs/partition.md: what cutting layers by the simulated step gains.

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

from section import write_section

from jaxpipe.schedules import simulate
from jaxpipe.schedules.partition import LayerCost, Plan, balanced, best, by_variance
from jaxpipe.schedules.partition.frozen import best_filled
from jaxpipe.schedules.partition.opposite import opposite

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
  """Returns layers of independent times, forwards from 50 to 400."""
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
  """Returns an embedding, 48 equal blocks, and a head that takes as long as four of them."""
  blocks = [LayerCost(f"block {i}", 100, 105, 95, 120, 34, 2) for i in range(48)]
  ends = (LayerCost("embed", 2, 0, 20, 500, 2, 2), LayerCost("head", 400, 400, 400, 500, 60, 0))
  return [ends[0], *blocks, ends[1]]


def conv_net() -> list[LayerCost]:
  """Returns layers as in image classifiers: early ones hold activations, late ones parameters."""
  layers = []
  for i in range(32):
    depth, time_ = i // 8, 160 - 20 * (i // 8) + 30 * (i % 8 == 0)
    layers.append(
      LayerCost(f"layer {i}", time_, time_, time_, 4 * 4**depth, 256 // 4**depth, 64 // 2**depth)
    )
  return layers


def backbone(seed: int, count: int) -> list[LayerCost]:
  """Returns the layers of a denoiser: of uneven time, F, I and W of one layer alike."""
  draw = random.Random(seed)
  times = [draw.randint(30, 120) for _ in range(count)]
  return [LayerCost(f"block {i}", t, t, t, 10, 5, 3) for i, t in enumerate(times)]


def encoders(work: float) -> list[LayerCost]:
  """Returns a text encoder of 24 short layers and an image encoder of 9 long ones.

  Args:
    work: time of all of them together.
  """
  shares = [10] * 24 + [120, 200, 260, 260, 200, 160, 120, 60, 60]
  return [
    LayerCost(f"frozen {i}", round(share * work / sum(shares))) for i, share in enumerate(shares)
  ]


def other_makespan(plan: Plan, rule) -> float:
  """Returns the makespan of the partition that a rule makes, under the plan's schedule."""
  schedule = plan.timeline.schedule
  return simulate(schedule, rule(plan.partition.layers, schedule.stages).costs(plan.hop)).makespan


def search_table() -> str:
  """Returns the table of gains, proofs and times, a row for each of `SHAPES`."""
  rows = [
    "| schedule | P | M | V | L | saved of `uniform` | of `balanced` | of `variance` | proven |"
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
  """Returns the table of the convolutional network under ever lower limits."""
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
  """Returns the table of a denoiser whose bubbles frozen encoders fill."""
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
        f" {filled.separate:,.0f} | {filled.gain:.1%} |"
      )
  return "\n".join(rows)


def opposite_table() -> str:
  """Returns the table of two denoisers that run through the same devices."""
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
`jaxpipe.schedules.partition` divides a list of layers into the stages of a schedule. It knows no
JAX and no model: a layer is a `LayerCost`, which has the times of its F, I and W for one
microbatch, and the bytes of its parameters, of the activations that it keeps and of its output.

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

`cut(layers, stages, method)` divides layers by a rule; all are exact, by dynamic programming.

| method | what it minimises |
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
- *Memory.* A device holds its stages' parameters and, at the worst moment of its list, the
  activations of `n` microbatches of each stage: linear as well. `memory_limit` bounds it.
- *Links.* A hop takes `hop`, and with `bandwidth` also the time of the partition's widest boundary.

The search is best-first branch and bound over the layers with which stages begin. The lower bound
of the first stages is the largest path through them, with the least that the stages to come can
add to it, by dynamic programming; means of paths count as paths. Every partition that is
simulated adds the path that decided it. Stages that no better partition can contain are left out.
When the lowest bound reaches the best value, the partition is `proven`; when `effort` is spent
first, `gap` says how much shorter a step might still be. Effort is counted, not timed, so all
processes of a job find the same partition.

Schedules that are planned around the costs (zb-auto, the V family, hanayo, ...) are planned anew
for each partition, under bounds that hold for every order; that is slow, so each counts as 100. A
`Schedule` that is passed in place of a name keeps its order.

{seeds} models a row, with forwards from 50 to 400, I 0.8 to 1.3 and W 0.6 to 1.1 of that, and a
hop of 3:

{search}

On 500 random cases (thirteen schedules, V up to 4, hops, limits, fewer layers than stages) what
`best` finds is as good as the best of all partitions: `./launch/test.sh tests/schedules/partition
--whole-grid`.

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
nowhere stands at the end. This is simulated only: no step runs the encoders. A backbone of 28
uneven layers and 33 frozen ones that take two fifths of its time, each piece 2 longer than its
share:

{frozen}

*Any filling*: the least share that stays idle, however that much frozen work is placed. *Encoders
first*: a step that runs the encoders before the backbone, on all devices at once, without a
bubble.

## Two backbones in opposite directions

`opposite.opposite(first, second, ...)` divides the two models of a cascade over the same devices:
one runs from the first device to the last, the other from the last to the first. The second
replica of a bidirectional schedule becomes the second model: stage P + s is its stage s, and
`paths` says which stages a microbatch visits. Both partitions are found together. The schedule is
checked, simulated and drawn like any other; a step with two models and two losses is not built.

{opposite}

Reproduce with `.venv/bin/python docs/make/partition.py` (it took {seconds:.0f} CPU seconds).
"""


def main() -> None:
  """Measures, and writes the section."""
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
  write_section("partition.md", "partition.py", text)
  print(text)


if __name__ == "__main__":
  main()
