"""Supervised tasks on a pretrained encoder, and probes of its frozen features."""
