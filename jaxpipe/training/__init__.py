"""Training runs: from the flags of an experiment to a trained model.

An experiment is a script in `experiments/`. It calls `command/` (any task) or `lm/` (language
models), which read the flags (`flags/`), decide on mesh, schedule and optimizer (`plan/`), find the
other processes of the run (`processes/`) and train (`loop/`). `tasks/` is what single experiments
need besides, `aot/` compiles a step for devices that are not there. Open `loop/loop.py` first.
"""
