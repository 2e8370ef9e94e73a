"""Runs of several processes: how they find one another, agree, and end together.

Open `processes.py` first; `cluster.py` reads what Slurm, a TPU pod or GKE says, `rendezvous.py`
meets.
"""
