"""Sweeps: many runs that differ in a few settings, declared in Python and worked off by a command that may die.

`variants.py` builds lists of variants, `manifest.py` says what a results folder holds (sweep.json), `jobs.py` runs what
is not finished yet, on the processes that `backends.py` gives it. The report is `moe/report/sweep.py`. Nothing here
imports model code: every run is a process of its own, `experiments/train.py`.
"""
