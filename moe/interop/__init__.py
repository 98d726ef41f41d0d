"""Hugging Face's DeepSeek-V3 format, in and out: `to_hf.export_run`, `from_hf.import_run`, and `load` onto a mesh.

names.py says which tensor is made of which of our arrays, hf_config.py does the same for settings, formats.py says how
FP8 and MXFP4 stand in files, shards.py reads and writes safetensors, run_weights.py reads slices of a run's checkpoint.
"""
