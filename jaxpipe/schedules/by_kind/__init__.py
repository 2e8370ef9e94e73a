"""Schedules whose ticks are chosen by kind, so that devices in lock-step never do F beside B.

Open `cycles.py` first: it has the table that constructions fill, and says how it becomes a
schedule. Each other module is one way of filling it; `schedules/registry.py` says which family has
which.
"""
