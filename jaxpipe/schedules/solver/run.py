"""Simulates words: the fast simulator of the searches, which starts where two words differ.

A search times thousands of candidates that differ in little, so this simulator knows no names,
microbatches or kinds, and copies from an earlier run all letters that start before the first
change: nothing that starts earlier can depend on it.

  since            v
  base    F F F I  | W F I W      copied up to here,
  words   F F F I  | F I W W      timed again from here on, on all devices
"""

import bisect
import dataclasses

from jaxpipe.schedules.solver.problem import Letter, Problem, Words


@dataclasses.dataclass(frozen=True)
class Run:
  """Words in time.

  Attributes:
    rows: `rows[d][i]` is the time at which device d starts the i-th letter of its word.
    letters: `letters[t][k]` is the time at which the k-th letter t starts.
    value: the objective, then the sum of all devices' last ends, which breaks its ties.
  """

  rows: list[list[int]]
  letters: list[list[int]]
  value: tuple[int, int]


def run(problem: Problem, words: Words, base: Run | None = None, since: int = 0) -> Run | None:
  """Times words.

  Args:
    problem: the letters' times and waits.
    words: one word per device, each its own F before its I before its W.
    base: a run of other words whose letters that start before `since` are the same ones.
    since: the time from which on letters are timed again; earlier ones are copied from `base`.

  Returns:
    The run; None if the words dead-lock.
  """
  times, inputs, lags = problem.times, problem.inputs, problem.lags
  P = len(words)
  if base is None:
    rows: list[list[int]] = [[] for _ in words]
    letters: list[list[int]] = [[] for _ in times]
  else:
    rows = [row[: bisect.bisect_left(row, since)] for row in base.rows]
    letters = [starts[: bisect.bisect_left(starts, since)] for starts in base.letters]
  sleepers: dict[Letter, int] = {}
  awake = list(range(P))
  while awake:
    # A device goes on until its next letter waits for one that has not been timed yet.
    d = awake.pop()
    word, row = words[d], rows[d]
    free = row[-1] + times[word[len(row) - 1]] if row else 0
    for t in word[len(row) :]:
      p = inputs[t]
      if p is not None:
        if len(letters[p]) <= len(letters[t]):
          sleepers[p] = d  # one letter has one reader: nobody else sleeps on it
          break
        arrival = letters[p][len(letters[t])] + times[p] + lags[t]
        if arrival > free:
          free = arrival
      row.append(free)
      letters[t].append(free)
      free += times[t]
      if t in sleepers:
        awake.append(sleepers.pop(t))
  # Nobody is awake, and somebody sleeps: a dead-lock.
  if any(len(row) < len(word) for row, word in zip(rows, words, strict=True)):
    return None
  ends = [row[-1] + times[word[-1]] for row, word in zip(rows, words, strict=True)]
  if problem.objective == "makespan":
    return Run(rows, letters, (max(ends), sum(ends)))
  return Run(rows, letters, (max(e - r[0] for e, r in zip(ends, rows, strict=True)), sum(ends)))
