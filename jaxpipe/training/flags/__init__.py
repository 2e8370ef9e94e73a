"""A run's configuration as one frozen value whose fields are flags.

Open `settings.py` first; `run_config.py` holds the flags that all experiments share.
"""
