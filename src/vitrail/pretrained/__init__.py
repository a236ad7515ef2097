"""Weights from elsewhere: read them under our names (`sources`, `google`), fit them to a run's model (`fit`).

weights = read_weights("timm:vit_tiny_patch16_224")
state, report = fit_weights(weights, config)
"""

from vitrail.pretrained.fit import InitReport, fit_weights
from vitrail.pretrained.sources import read_weights
from vitrail.pretrained.timm_model import build_from_timm, convert_timm
from vitrail.pretrained.weights import Weights

__all__ = [
    "InitReport",
    "Weights",
    "build_from_timm",
    "convert_timm",
    "fit_weights",
    "read_weights",
]
