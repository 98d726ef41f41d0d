"""experts.json: what a run's experts did in its newest evaluation.

`moe.train.experts` writes it, sealed as all JSON of ours is, and `moe.report.experts` reads it.
"""

FILE = 'experts.json'
WEIGHT_STEPS = 10_000  # a gate weight is kept in whole parts of this
