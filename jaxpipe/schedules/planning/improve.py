"""Local search: moves single letters of words that lie on a critical path.

The objective is as long as a chain of letters, each of which starts when the one before it ends
or arrives; nothing improves unless the chain is broken. So every move takes a letter of the chain
and puts it elsewhere in its device's word. Memory that the move lacks is found by pulling the
next W or I that frees some in front of it.

  word      ... W0 F3 I1 W1 ...      chain: F3 on its way to the next device, held up by W0
  move      ... F3 I1 W0 W1 ...      W0 behind I1

Late acceptance (Burke and Bykov, 2017): a move is taken if it is no worse than where the search
was some moves ago, which leaves local optima without a temperature to tune.
"""

import bisect
import random

from jaxpipe.schedules.planning.problem import Letter, Problem, Words
from jaxpipe.schedules.planning.run import Run, run

# How far back a move is compared; longer searches wander further before they settle.
_HISTORY = 40
_REPAIRS = 4
# Shares of moves: off the chain, to make room for later ones; and across devices.
_ELSEWHERE = 0.3
_PULLS = 0.3


def improve(
  problem: Problem, words: Words, *, moves: int, bound: int, seed: int = 0
) -> tuple[Words, int]:
  """Searches around words that fit.

  The same arguments give the same words on every machine: all processes of a job must agree.

  Args:
    problem: what is asked.
    words: where to start, within the limits.
    moves: number of moves to try.
    bound: an objective that cannot be beaten, where to stop.
    seed: of the choice of moves.

  Returns:
    The best words seen, and their objective.
  """
  draw = random.Random(seed)
  here = run(problem, words)
  assert here is not None
  words, best, best_run = list(words), list(words), here
  chain = _chain(problem, words, here)
  history = [here.value] * _HISTORY
  for step in range(moves):
    if best_run.value[0] <= bound:
      break
    d, i = chain[int(draw.random() * len(chain))]
    if draw.random() < _ELSEWHERE:
      d = int(draw.random() * len(words))
      i = int(draw.random() * len(words[d]))
    j = _target(problem, words[d], i, draw)
    if j < i and draw.random() < _PULLS:
      trial, since = _pulled(problem, words, here, d, i, j), here.rows[d][j]
    else:
      trial = [*words[:d], _moved(words[d], i, j), *words[d + 1 :]]
      since = here.rows[d][min(i, j)]
    legal = _legal(problem, words, trial)
    there = None if legal is None else run(problem, legal, here, since)
    if legal is None or there is None:
      continue
    past = history[step % _HISTORY]
    if there.value <= past or there.value <= here.value:
      words, here = legal, there
      chain = _chain(problem, words, here)
      if here.value < best_run.value:
        best, best_run = list(words), here
    if here.value < past:
      history[step % _HISTORY] = here.value
  return best, best_run.value[0]


def _chain(problem: Problem, words: Words, here: Run) -> list[tuple[int, int]]:
  """The letters, as (device, place in its word), that make the objective as long as it is."""
  S, times = problem.placement.stages, problem.times
  ends = [row[-1] + times[word[-1]] for row, word in zip(here.rows, words, strict=True)]
  if problem.objective == "span":
    ends = [end - row[0] for end, row in zip(ends, here.rows, strict=True)]
  d = ends.index(max(ends))
  i = len(words[d]) - 1
  chain = [(d, i)]
  while i:
    t, start = words[d][i], here.rows[d][i]
    if here.rows[d][i - 1] + times[words[d][i - 1]] >= start:
      i -= 1
    else:
      p = problem.inputs[t]
      assert p is not None  # only what waits for another device starts later than it could
      k = words[d][:i].count(t)
      d = problem.placement.device(p % S)
      i = _place(words[d], p, k)
    chain.append((d, i))
  return chain


def _place(word: list[Letter], t: Letter, k: int) -> int:
  """Where the k-th t stands."""
  at = -1
  for _ in range(k + 1):
    at = word.index(t, at + 1)
  return at


def _target(problem: Problem, word: list[Letter], i: int, draw: random.Random) -> int:
  """Where the letter at i goes: mostly near, a W anywhere."""
  if word[i] >= 2 * problem.placement.stages and draw.random() < 0.5:
    return int(draw.random() * len(word))
  # Geometric: neighbours most often, half a word at times.
  distance = 1
  while draw.random() < 0.6:
    distance += 1
  j = i - distance if draw.random() < 0.5 else i + distance
  return min(max(j, 0), len(word) - 1)


def _moved(word: list[Letter], i: int, j: int) -> list[Letter]:
  word = list(word)
  word.insert(j, word.pop(i))
  return word


def _pulled(problem: Problem, words: Words, here: Run, d: int, i: int, j: int) -> Words:
  """Moves a letter from i to j together with all that it then waits for, on all devices.

  One word at a time, a forward of a second chunk cannot come early: the stages between would still
  be late, and each of them alone has no reason to be early.
  """
  S, since, inputs = problem.placement.stages, here.rows[d][j], problem.inputs
  t = words[d][i]
  wanted = set()
  stack = [(t, bisect.bisect_left(here.letters[t], here.rows[d][i]))]
  while stack:
    t, k = stack.pop()
    if (t, k) in wanted or k < 0 or here.letters[t][k] < since:
      continue
    wanted.add((t, k))
    p = inputs[t]
    stack += [(t, k - 1), *([(t - S, k)] if t >= S else []), *([(p, k)] if p is not None else [])]
  trial = []
  for word, row in zip(words, here.rows, strict=True):
    low = bisect.bisect_left(row, since)
    count = [bisect.bisect_left(starts, since) for starts in here.letters]
    early: list[Letter] = []
    late: list[Letter] = []
    for t in word[low:]:
      (early if (t, count[t]) in wanted else late).append(t)
      count[t] += 1
    trial.append([*word[:low], *early, *late] if early else word)
  return trial


def _legal(problem: Problem, words: Words, trial: Words) -> Words | None:
  """The trial if it differs and is legal, after small repairs; else None."""
  repaired = []
  for d, (old, new) in enumerate(zip(words, trial, strict=True)):
    word = old if new is old else _repaired(problem, d, new)
    if word is None:
      return None
    repaired.append(word)
  return None if repaired == words else repaired


def _repaired(problem: Problem, d: int, word: list[Letter]) -> list[Letter] | None:
  """The word if it keeps F before I before W and the limit, after small repairs; else None."""
  S, changes = problem.placement.stages, problem.changes
  limit = None if problem.limits is None else problem.limits[d]
  count = [0] * len(changes)
  held = repairs = q = 0
  while q < len(word):
    t = word[q]
    if t >= S and count[t - S] <= count[t]:
      return None
    if limit is not None and held + changes[t] > limit:
      r = _relief(problem, word, q, count)
      if r is None or repairs == _REPAIRS:
        return None
      word.insert(q, word.pop(r))
      repairs += 1
      continue  # with what was pulled here
    held += changes[t]
    count[t] += 1
    q += 1
  return word


def _relief(problem: Problem, word: list[Letter], q: int, count: list[int]) -> int | None:
  """The next letter from q on that frees memory and may run at q."""
  S, changes = problem.placement.stages, problem.changes
  for r in range(q, len(word)):
    t = word[r]
    # Only the next one of its letter: the others count from it.
    if changes[t] < 0 and t >= S and count[t - S] > count[t]:
      return r
  return None
