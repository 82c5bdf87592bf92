"""Figures of merit: classification, segmentation and COCO's average precision."""
