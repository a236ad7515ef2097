"""From a source to batches: records (`sources`), pixels (`decode`), the order of samples, batches.

Whatever the source, training sees one uint8 array with labels and class names.
"""

from vitrail.data.datasets import ImageSet, fingerprint, load_split, load_training_data, split_records
from vitrail.data.decode import BadImageError, open_image, open_picture, to_pixels
from vitrail.data.order import SampleStream

__all__ = [
    "BadImageError",
    "ImageSet",
    "SampleStream",
    "fingerprint",
    "load_split",
    "load_training_data",
    "open_image",
    "open_picture",
    "split_records",
    "to_pixels",
]
