"""What `experiments/bench.py` measures, one suite per file. Each checks its results before it times them."""
