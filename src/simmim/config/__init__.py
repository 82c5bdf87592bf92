"""Configurations: what can be set, its types and defaults, and the recipes."""
