"""The configuration of a run as one frozen dataclass whose fields are the command line's flags.

Open `settings.py` first, which defines such a dataclass; `flags.py` makes absl flags of its fields
and reads them back, `run_config.py` holds the flags that all experiments share.
"""
