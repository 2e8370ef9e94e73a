"""Runs of several processes: how they find one another, agree, and end together.

Open `processes.py` first. It asks `cluster.py` for what Slurm, GKE or a TPU pod knows of the job,
and `rendezvous.py` waits until all processes have started.
"""
