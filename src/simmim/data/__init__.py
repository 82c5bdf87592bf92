"""Unlabelled images from files to batches. Heavy libraries (Pillow, OpenCV, Grain, datasets) load on first use."""

from simmim.data.augment import Box, CentreCrop, RandomResizedCrop, crop_resize
from simmim.data.bad_images import BadImages, TooManyBadImages
from simmim.data.decode import BadImage
from simmim.data.files import PathList
from simmim.data.pipeline import Batch, Reading, eval_images, train_batches
from simmim.data.sources import ImageSource, Subset, open_source, sniff
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD, measure_mean_std

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BadImage",
    "BadImages",
    "Batch",
    "Box",
    "CentreCrop",
    "ImageSource",
    "PathList",
    "RandomResizedCrop",
    "Reading",
    "Subset",
    "TooManyBadImages",
    "crop_resize",
    "eval_images",
    "measure_mean_std",
    "open_source",
    "sniff",
    "train_batches",
]
