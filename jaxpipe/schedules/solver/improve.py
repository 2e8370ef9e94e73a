"""Local search: moves single letters of words that lie on a critical path.

The objective is as long as a chain of letters, each of which starts when the one before it ends
or arrives; nothing improves unless the chain is broken. So every move takes a letter of the chain
and puts it elsewhere in its device's word. Where the move exceeds the memory limit, the next W or I
that frees memory is pulled in front of it.

  word      ... W0 F3 I1 W1 ...      chain: F3 on its way to the next device, held up by W0
  move      ... F3 I1 W0 W1 ...      W0 behind I1

Late acceptance (Burke and Bykov, 2017): a move is taken if it is no worse than where the search
was some moves ago, which leaves local optima without a temperature to tune.
"""

import bisect
import random

from jaxpipe.schedules.solver.problem import Letter, Problem, Words
from jaxpipe.schedules.solver.run import Run, run

# How far back a move is compared; longer searches wander further before they settle.
_HISTORY = 40
_REPAIRS = 4
# Shares of moves: of letters off the chain, which may help later moves; and across devices.
_ELSEWHERE = 0.3
_PULLS = 0.3


def improve(
  problem: Problem, words: Words, *, moves: int, bound: int, seed: int = 0
) -> tuple[Words, int]:
  """Searches around words that fit the limits.

  Equal arguments give equal words on every machine: all processes of a job must agree.

  Args:
    problem: letters, times and limits.
    words: words to start from, within the limits.
    moves: number of moves to try.
    bound: an objective that cannot be beaten; the search stops when it is reached.
    seed: seed of the choice of moves.

  Returns:
    The best words seen, and their objective.
  """
  draw = random.Random(seed)
  timed = run(problem, words)
  assert timed is not None
  words, best, best_run = list(words), list(words), timed
  chain = _chain(problem, words, timed)
  history = [timed.value] * _HISTORY
  for step in range(moves):
    if best_run.value[0] <= bound:
      break
    # Nothing shortens the objective but a move on the chain; others may help later ones.
    d, i = chain[int(draw.random() * len(chain))]
    if draw.random() < _ELSEWHERE:
      d = int(draw.random() * len(words))
      i = int(draw.random() * len(words[d]))
    j = _target(problem, words[d], i, draw)
    # `since` is the start of the first letter that changes its place: all before it is copied.
    if j < i and draw.random() < _PULLS:
      trial, since = _pulled(problem, words, timed, d, i, j), timed.rows[d][j]
    else:
      trial = [*words[:d], _moved(words[d], i, j), *words[d + 1 :]]
      since = timed.rows[d][min(i, j)]
    legal = _legal(problem, words, trial)
    tried = None if legal is None else run(problem, legal, timed, since)
    if legal is None or tried is None:
      continue
    # Late acceptance: no worse than some moves ago, or than now.
    past = history[step % _HISTORY]
    if tried.value <= past or tried.value <= timed.value:
      words, timed = legal, tried
      chain = _chain(problem, words, timed)
      if timed.value < best_run.value:
        best, best_run = list(words), timed
    # Entries of the history only fall.
    if timed.value < past:
      history[step % _HISTORY] = timed.value
  return best, best_run.value[0]


def _chain(problem: Problem, words: Words, timed: Run) -> list[tuple[int, int]]:
  """Returns a chain of letters that decides the objective, as (device, position in its word)."""
  S, times = problem.placement.stages, problem.times
  ends = [row[-1] + times[word[-1]] for row, word in zip(timed.rows, words, strict=True)]
  if problem.objective == "span":
    ends = [end - row[0] for end, row in zip(ends, timed.rows, strict=True)]
  d = ends.index(max(ends))
  i = len(words[d]) - 1
  chain = [(d, i)]
  while i:
    t, start = words[d][i], timed.rows[d][i]
    # Either the letter before it held it up, or the input that arrived last.
    if timed.rows[d][i - 1] + times[words[d][i - 1]] >= start:
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
  """Returns the position of the k-th letter t of a word."""
  at = -1
  for _ in range(k + 1):
    at = word.index(t, at + 1)
  return at


def _target(problem: Problem, word: list[Letter], i: int, draw: random.Random) -> int:
  """Draws a new position for the letter at i: mostly a near one, for a W often any."""
  if word[i] >= 2 * problem.placement.stages and draw.random() < 0.5:
    return int(draw.random() * len(word))
  # Geometric: neighbours most often, half a word at times.
  distance = 1
  while draw.random() < 0.6:
    distance += 1
  j = i - distance if draw.random() < 0.5 else i + distance
  return min(max(j, 0), len(word) - 1)


def _moved(word: list[Letter], i: int, j: int) -> list[Letter]:
  """Returns a word with the letter at i moved to j."""
  word = list(word)
  word.insert(j, word.pop(i))
  return word


def _pulled(problem: Problem, words: Words, timed: Run, d: int, i: int, j: int) -> Words:
  """Moves a letter from i to j, together with all letters that it then waits for on any device.

  One word at a time, a forward of a second chunk cannot come early: the stages between would still
  be late, and each of them alone has no reason to be early.
  """
  S, since, inputs = problem.placement.stages, timed.rows[d][j], problem.inputs
  t = words[d][i]
  wanted = set()
  stack = [(t, bisect.bisect_left(timed.letters[t], timed.rows[d][i]))]
  while stack:
    t, k = stack.pop()
    if (t, k) in wanted or k < 0 or timed.letters[t][k] < since:
      continue
    wanted.add((t, k))
    p = inputs[t]
    stack += [(t, k - 1), *([(t - S, k)] if t >= S else []), *([(p, k)] if p is not None else [])]
  trial = []
  for word, row in zip(words, timed.rows, strict=True):
    low = bisect.bisect_left(row, since)
    count = [bisect.bisect_left(starts, since) for starts in timed.letters]
    early: list[Letter] = []
    late: list[Letter] = []
    for t in word[low:]:
      (early if (t, count[t]) in wanted else late).append(t)
      count[t] += 1
    trial.append([*word[:low], *early, *late] if early else word)
  return trial


def _legal(problem: Problem, words: Words, trial: Words) -> Words | None:
  """Returns the trial after small repairs, if it then is legal and differs from the words."""
  repaired = []
  for d, (old, new) in enumerate(zip(words, trial, strict=True)):
    word = old if new is old else _repaired(problem, d, new)
    if word is None:
      return None
    repaired.append(word)
  return None if repaired == words else repaired


def _repaired(problem: Problem, d: int, word: list[Letter]) -> list[Letter] | None:
  """Returns a device's word, repaired to keep its memory limit; None if that takes too much.

  None, too, if some I comes before its F, or some W before its I.
  """
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
      continue  # with the letter that was pulled to q
    held += changes[t]
    count[t] += 1
    q += 1
  return word


def _relief(problem: Problem, word: list[Letter], q: int, count: list[int]) -> int | None:
  """Returns the position of the next letter from q on that frees memory and may run at q."""
  S, changes = problem.placement.stages, problem.changes
  for r in range(q, len(word)):
    t = word[r]
    # Only the next one of its letter: the others count from it.
    if changes[t] < 0 and t >= S and count[t - S] > count[t]:
      return r
  return None
