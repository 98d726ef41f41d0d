"""Balancing: bias rules and auxiliary losses, chosen by the config, and the measures of balance."""
