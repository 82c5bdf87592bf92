"""Unlabelled images from files to batches. Heavy libraries (Pillow, OpenCV, Grain, datasets) load on first use."""
