"""Packed shards: their format and their writer."""
