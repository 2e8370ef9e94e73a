"""A scheduling problem in whole numbers, and its solution by heuristics, local search or CP-SAT.

Open `problem.py` first. `run.py` times a candidate and `bounds.py` says what no candidate can beat;
`greedy.py` and `fill.py` make candidates, `improve.py` changes them step by step, and `exact.py`
proves the best one of a small problem.
"""
