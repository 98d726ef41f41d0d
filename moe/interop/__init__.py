"""Hugging Face's DeepSeek-V3 format, in and out: `to_hf.export_run` and `from_hf.import_run`.

names.py says which tensor is made of which of our arrays, hf_config.py does the same for settings, shards.py reads and
writes safetensors, folder.py lets a folder appear whole or not at all.
"""
