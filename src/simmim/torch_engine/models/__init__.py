"""Encoders that accept a mask, prediction heads, and the masked image model."""
