"""Vision Transformers for small images, from scratch, that one can see through.

    import vitrail
    run = vitrail.train(vitrail.get_preset("tiny"), "runs/digits")
    vitrail.load("runs/digits").predict(["digit.png"])

Names are looked up on first use, so that `import vitrail` does not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrail.config import RunConfig
    from vitrail.evaluate import evaluate
    from vitrail.predict import Classifier, load
    from vitrail.presets import get_preset
    from vitrail.run import load_run
    from vitrail.train import resume, train
    from vitrail.vit import VisionTransformer, build_vit

__all__ = [
    "Classifier",
    "RunConfig",
    "VisionTransformer",
    "build_vit",
    "evaluate",
    "get_preset",
    "load",
    "load_run",
    "resume",
    "train",
]

_HOMES = {
    "Classifier": "predict",
    "RunConfig": "config",
    "VisionTransformer": "vit",
    "build_vit": "vit",
    "evaluate": "evaluate",
    "get_preset": "presets",
    "load": "predict",
    "load_run": "run",
    "resume": "train",
    "train": "train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    return getattr(import_module(f"vitrail.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """Keeps `vitrail.train` the verb: importing the module of that name must not take its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
