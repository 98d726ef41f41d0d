"""Turns a run directory into `summary.json` and a self-contained `report.html`.

`run.py` reads the directory and makes the summary, `figures.py` draws, `html.py` lays out the page. Nothing here
imports model code: a report needs the run's files, numpy and matplotlib.
"""
