"""Writes docs/search.md: what searching gains over the best named schedule that fits.

    .venv/bin/python docs/make/search_table.py

Takes about five minutes on one core. OR-tools (`pip install jaxpipe[search]`) must be installed:
small instances go to its constraint solver.
"""

import collections
import pathlib
import random
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from jaxpipe.schedules import Costs, Placement, schedule_names
from jaxpipe.schedules.peaks import peaks
from jaxpipe.schedules.search import named_schedules, search
from jaxpipe.schedules.solver.problem import Problem, pose

INSTANCES = 200
PAGE = pathlib.Path(__file__).parents[1] / "search.md"

TEXT = """\
# Searching for a schedule

`jaxpipe.schedules.search.search` looks for the shortest schedule for given times of every stage
under the memory limits of every device. What it returns is never worse than a named schedule of
the same placement that fits. No schedule is shorter than its `lower_bound`, and `optimal` says
that none is shorter than what was found.

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

The search has three steps: the named schedules with every kind of backward (fused, split,
deferred), and list schedules by {policies} policies; a local search along critical paths around the
best six; and, with OR-tools, a constraint solver where there are at most 120 actions F, I and W
(P=4, V=2, M=5). `.venv/bin/pip install -e '.[search]'` installs OR-tools; without them the third
step is left out. Effort is counted and random numbers are seeded, so all processes of a job find
the same schedule.

## What it gains

{count} instances, numbered by their seed. Each draws P from 2 to 8, M from 2 to 32, V=1 (two in
three) or V=2 on a loop or a V; for every stage times from 4 to 12 for F and I and from 2 to 12
for W, the memory that F takes from 2 to 6, and how much of it I frees; the hop from 0 to 3. Three
in four have a limit for each device: one to two times what the named schedule that needs least
holds there, so that one always fits (no limit where no named schedule has the placement).

The gains are over the schedules that had names when this was measured, fewer than there are now:
{names}.

*Gain*: 1 - makespan found / makespan of the best named schedule that fits. *Gap*: makespan found /
lower bound - 1, of the instances that were not proven optimal.

{table}

Worse than a named schedule: {worse}. Reproduce with `.venv/bin/python docs/make/search_table.py`
(it took {seconds:.0f} s on one core).
"""


def draw_problem(seed: int) -> dict[str, object]:
  """Returns the arguments of `search` for one instance; sizes follow from its placement."""
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
  """Searches; returns P, the best named makespan, the one found, whether optimal, and the bound."""
  instance = draw_problem(seed)
  place = instance["placement"]
  problem: Problem = pose(**instance, objective="makespan")
  rest = {key: instance[key] for key in ("costs", "memory", "memory_limit")}
  values = [problem.value(schedule) for schedule in named_schedules(problem, **rest)]
  named = min((v / problem.scale for v in values if v is not None), default=None)
  found = search(devices=place.devices, chunks=place.chunks, **instance)
  return place.devices, named, found.value, found.optimal, found.lower_bound


def table(results: list[tuple[int, float | None, float, bool, float]]) -> str:
  """Returns the page's table: a row for each P, and one for all."""
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
  from jaxpipe.schedules.solver.greedy import POLICIES

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
