"""The device mesh, how arrays lie on it, and the processes that share it."""
