"""Reads what XLA made of a step: how often something is copied, sent or multiplied, and where.

These modules check and report; the executor never imports them. Open `step.py` first, which sums up
one compiled step; `hlo.py` parses the text.
"""
