"""The commands: a module each, with its flags and its main, for `moe NAME` and experiments/NAME.py."""
