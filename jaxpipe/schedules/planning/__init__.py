"""Planners that walk through time, for families whose order is not drawn but follows from costs.

Open `list_schedule.py` first, the engine of most of them, with its memory rule in `lanes.py`.
`building_block.py`, `v_trials.py` and `v_search.py` plan V-shaped schedules, `paths.py` and
`routes.py` those in which microbatches skip stages.
"""
