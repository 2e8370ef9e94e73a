"""Writes docs/search.md: what searching gains over the best named schedule that fits.

  .venv/bin/python docs/make/search_table.py

Takes about three minutes on one core. OR-tools (`pip install jaxpipe[search]`) must be installed:
small instances go to the solver.
"""

import collections
import pathlib
import random
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from jaxpipe.schedules import Costs, Placement, schedule_names
from jaxpipe.schedules.peaks import peaks
from jaxpipe.schedules.planning.problem import Problem, pose
from jaxpipe.schedules.search import named_schedules, search

INSTANCES = 200
PAGE = pathlib.Path(__file__).parents[1] / "search.md"

TEXT = """\
# Searching for a schedule

`jaxpipe.schedules.search.search` looks for the best schedule of given per-stage times under
per-device memory limits. What it returns is never worse than any named schedule of the same
placement that fits; `lower_bound` says how much better any other could be, and `optimal` whether
none is.

```python
from jaxpipe.schedules import Costs
from jaxpipe.schedules.search import search

found = search(
  devices=4,
  microbatches=8,
  costs=Costs([2, 2, 7, 2], [2, 2, 6, 3], [2, 2, 2, 5], hop=1),
  memory_limit=[4, 3, 3, 2],
)
found.schedule, found.value, found.lower_bound, found.optimal
```

Steps: the named schedules in every cut of their backward, and list schedules by {policies}
policies; local search along critical paths round the best six; a constraint solver where F, I and W
number 120 or fewer together (P=4, V=2, M=5). Effort is counted and chance is seeded, so all
processes of a job find the same schedule.

## What it gains

{count} instances, numbered by their seed. Each draws P from 2 to 8, M from 2 to 32, V=1 (two in
three) or V=2 on a loop or a V; for every stage times from 4 to 12 for F and I and from 2 to 12 for
W, what F holds from 2 to 6, and how much of that I frees; the hop from 0 to 3. Three in four have
limits, by device: one to two times what the thriftiest named schedule holds there, so that one
always fits (no limit where no name has the placement).

Names: {names}.

Gain: 1 - makespan found / makespan of the best named schedule that fits. Gap: makespan found /
lower bound - 1, over those instances that were not proven optimal.

{table}

Worse than a named schedule: {worse}. Reproduce with `.venv/bin/python docs/make/search_table.py`
(it took {seconds:.0f} s on one core).
"""


def draw_problem(seed: int) -> dict[str, object]:
  """The arguments of `search` for one instance, but for sizes that the placement tells."""
  draw = random.Random(seed)
  P, M, V = draw.randint(2, 8), draw.randint(2, 32), draw.choice([1, 1, 2])
  S = P * V
  place = Placement.v(P) if V == 2 and draw.random() < 0.5 else Placement.loop(P, V)
  costs = Costs(
    [draw.randint(4, 12) for _ in range(S)],
    [draw.randint(4, 12) for _ in range(S)],
    [draw.randint(2, 12) for _ in range(S)],
    draw.randint(0, 3),
  )
  held = [draw.randint(2, 6) for _ in range(S)]
  freed = [draw.randint(0, x - 1) for x in held]
  memory = (held, [-x for x in freed], [y - x for x, y in zip(held, freed, strict=True)])
  instance = {"placement": place, "microbatches": M, "costs": costs, "memory": memory}
  limit = None
  if draw.random() < 0.75:
    free = pose(**instance, memory_limit=None, objective="makespan")
    tops = [peaks(s, memory).memory for s in named_schedules(free, costs, memory, None)]
    limit = [int(x * draw.uniform(1, 2)) for x in min(tops, key=max)] if tops else None
  return instance | {"memory_limit": limit}


def measure(seed: int) -> tuple[int, float | None, float, bool, float]:
  """P, the best named makespan, the one found, whether it is optimal, and the bound."""
  instance = draw_problem(seed)
  place = instance["placement"]
  problem: Problem = pose(**instance, objective="makespan")
  rest = {key: instance[key] for key in ("costs", "memory", "memory_limit")}
  values = [problem.value(schedule) for schedule in named_schedules(problem, **rest)]
  named = min((v / problem.scale for v in values if v is not None), default=None)
  found = search(devices=place.devices, chunks=place.chunks, **instance)
  return place.devices, named, found.value, found.optimal, found.lower_bound


def table(results: list[tuple[int, float | None, float, bool, float]]) -> str:
  """One row per P, and one for all."""
  groups = collections.defaultdict(list)
  for result in results:
    groups[str(result[0])].append(result)
  rows = [
    "| P | instances | mean gain | most | proven optimal | mean gap of the rest | largest |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, group in [*sorted(groups.items()), ("all", results)]:
    gains = [1 - value / named for _, named, value, _, _ in group if named]
    gaps = [value / bound - 1 for _, _, value, optimal, bound in group if not optimal] or [0]
    proven = sum(optimal for *_, optimal, _ in group)
    rows.append(
      f"| {name} | {len(group)} | {sum(gains) / len(gains):.1%} | {max(gains):.1%} | {proven} |"
      f" {sum(gaps) / len(gaps):.1%} | {max(gaps):.1%} |"
    )
  return "\n".join(rows)


def main() -> None:
  """Runs all instances and writes the page."""
  from jaxpipe.schedules.planning.greedy import POLICIES

  begin = time.monotonic()
  results = []
  for seed in range(INSTANCES):
    results.append(measure(seed))
    print(seed, *results[-1], f"{time.monotonic() - begin:.0f} s", flush=True)
  text = TEXT.format(
    policies=len(POLICIES),
    count=INSTANCES,
    names=", ".join(f"`{name}`" for name in schedule_names()),
    table=table(results),
    worse=sum(named is not None and value > named for _, named, value, _, _ in results),
    seconds=time.monotonic() - begin,
  )
  PAGE.write_text(text)
  print(text)


if __name__ == "__main__":
  main()
