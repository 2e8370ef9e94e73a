"""Makes candidates forwards in time: whenever a device is free, it takes the best action it can.

A policy says how many forwards a device keeps ahead of its backwards, how long a W may keep a
gradient waiting, whether forwards or gradients go first, and how memory is shared out among chunks.
None is right for all costs, so `search` tries a grid.
"""

import dataclasses
import heapq
import math

from jaxpipe.schedules.solver.problem import Letter, Problem, Words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """The rules by which a device chooses its next letter.

  Attributes:
    ahead: forwards in flight to aim at, as a share of those that fill the round trip to the last
      stage and back.
    patience: share of a W by which it may delay an F or I that is known to arrive.
    forward_first: whether an F goes before an I while the device is not `ahead`.
    cautious: whether a device that is `ahead` stays idle rather than run further ahead, and begins
      a microbatch only if its memory can take that and all begun ones through all its chunks.
  """

  ahead: float
  patience: float
  forward_first: bool
  cautious: bool


POLICIES = tuple(
  Policy(ahead=ahead, patience=patience, forward_first=forward_first, cautious=cautious)
  for ahead in (0.5, 1.0, 1.25, 1.5, 2.0, math.inf)
  for patience in (0.0, 0.5, 1.0)
  for forward_first in (False, True)
  for cautious in (False, True)
)


@dataclasses.dataclass(kw_only=True)
class _State:
  """A schedule that is being made.

  Attributes:
    problem: letters, times and limits.
    policy: the rules.
    depth: S numbers of forwards in flight that each stage aims at.
    words: the word of each device so far.
    ends: for each letter, the ends of those that have started.
    held: P amounts, the memory that each device holds now.
  """

  problem: Problem
  policy: Policy
  depth: list[float]
  words: Words
  ends: list[list[int]]
  held: list[int]


def build(problem: Problem, policy: Policy) -> Words | None:
  """Makes words by a policy.

  Args:
    problem: letters, times and limits.
    policy: the rules by which devices choose.

  Returns:
    One word per device, within the limits; None if the policy runs into a dead end.
  """
  state = _State(
    problem=problem,
    policy=policy,
    depth=[policy.ahead * x for x in _round_trips(problem)],
    words=[[] for _ in range(problem.placement.devices)],
    ends=[[] for _ in problem.times],
    held=[0] * problem.placement.devices,
  )
  free = [0] * problem.placement.devices
  readers = {p: t for t, p in enumerate(problem.inputs) if p is not None}
  S = problem.placement.stages
  home = [problem.placement.device(t % S) for t in range(3 * S)]
  events = [(0, d) for d in range(problem.placement.devices)]
  while events:
    now, d = heapq.heappop(events)
    # Everything that happens now comes in before anybody chooses: see the order of the heap.
    if free[d] > now or (events and events[0] == (now, d)):
      continue
    t = _choose(state, d, now)
    if t is None:
      continue
    free[d] = now + problem.times[t]
    state.words[d].append(t)
    state.ends[t].append(free[d])
    state.held[d] += problem.changes[t]
    heapq.heappush(events, (free[d], d))
    if t in readers:
      reader = readers[t]
      heapq.heappush(events, (free[d] + problem.lags[reader], home[reader]))
  complete = sum(map(len, state.words)) == len(problem.times) * problem.microbatches
  return state.words if complete else None


def _round_trips(problem: Problem) -> list[float]:
  """Returns, by stage, the forwards that fit between an F's start and its gradient's arrival.

  They are counted at the pace of the slowest device, which sets everybody's in the long run.
  """
  S, times, lags = problem.placement.stages, problem.times, problem.lags
  pace = max(
    sum(times[k * S + s] for s in row for k in range(3)) for row in problem.placement.table
  )
  # `or 1`: a step that takes no time at all has no pace.
  trips, clock = [0.0] * S, 0
  for s in reversed(range(S)):
    clock += times[s] + times[S + s]
    trips[s] = 1 + (clock - times[s]) / (pace or 1)
    clock += lags[s] + (lags[S + s - 1] if s else 0)
  return trips


def _choose(state: _State, d: int, now: int) -> Letter | None:
  """Returns the letter that device d starts now, or None to wait."""
  problem, ends, S = state.problem, state.ends, state.problem.placement.stages
  ready: list[Letter] = []
  soon = math.inf
  for s in problem.placement.table[d]:
    for t in (s, S + s):
      at = _arrival(state, t)
      if at <= now and _fits(state, d, t):
        ready.append(t)
      elif at > now:
        soon = min(soon, at)
  # Deeper stages first: they lead to gradients, and gradients lead home.
  inputs = [t for t in ready if t >= S]
  forwards = [t for t in ready if t < S]
  eager = [s for s in forwards if len(ends[s]) - len(ends[S + s]) < state.depth[s]]
  if eager and (state.policy.forward_first or not inputs):
    return max(eager)
  if inputs:
    return min(inputs)
  weights = [
    2 * S + s
    for s in problem.placement.table[d]
    if len(ends[2 * S + s]) < len(ends[S + s]) and _fits(state, d, 2 * S + s)
  ]
  for t in weights:
    if now + problem.times[t] * (1 - state.policy.patience) <= soon:
      return t
  # Idle for want of gradients: running ahead does no harm but to memory. Never a dead end that
  # waiting would have avoided, for `_fits` keeps memory for the oldest microbatch.
  if forwards and not weights and soon == math.inf and not state.policy.cautious:
    return max(forwards)
  return None


def _arrival(state: _State, t: Letter) -> float:
  """Returns when the next letter t could start; infinity if unknown yet, or if all are done."""
  problem, ends, S = state.problem, state.ends, state.problem.placement.stages
  k = len(ends[t])
  if k == problem.microbatches or (t >= S and k >= len(ends[t - S])):
    return math.inf
  p = problem.inputs[t]
  if p is None:
    return 0
  return ends[p][k] + problem.lags[t] if k < len(ends[p]) else math.inf


def _fits(state: _State, d: int, t: Letter) -> bool:
  """Returns whether device d has memory for the next letter t.

  A forward must leave enough for the device's oldest microbatch to go through all chunks. Else
  first chunks could fill the memory that the second chunks need, and nobody could go on.
  """
  problem, ends, S = state.problem, state.ends, state.problem.placement.stages
  if problem.limits is None:
    return True
  left = problem.limits[d] - state.held[d] - problem.changes[t]
  if t >= S:
    return left >= 0
  stages = problem.placement.table[d]
  oldest = min(len(ends[s]) for s in stages)
  if state.policy.cautious:
    # Those through all chunks will be gone; the others will hold all that they need.
    begun = max(len(ends[s]) + (s == t) for s in stages)
    whole = sum(problem.changes[s] for s in stages)
    if (begun - oldest) * whole > problem.limits[d]:
      return False
  if len(ends[t]) > oldest:
    left -= sum(problem.changes[s] for s in stages if len(ends[s]) == oldest)
  return left >= 0
