"""Readers that load images ahead of the training: threads, worker processes, and JPEGs for a GPU to decode."""
