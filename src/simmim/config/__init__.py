"""Configurations: settings, their types and defaults, and recipes."""
