"""The language-model experiment: its flags, its run, loading of trained weights, sampling of text.

Open `run.py` first, which builds the run of `experiments/lm.py` from its flags (`config.py`);
`command.py` is what that script calls, as other experiments call `run_task`.
"""
