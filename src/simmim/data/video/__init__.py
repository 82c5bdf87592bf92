"""Clips as sources of images: their frames found, chosen and decoded."""
