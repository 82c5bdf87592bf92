"""Labelled data sets: classification, segmentation and detection."""
