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
    from vitrail.compare import compare
    from vitrail.config import RunConfig
    from vitrail.evaluate import evaluate
    from vitrail.explain import explain, explain_picture
    from vitrail.predict import Classifier, load
    from vitrail.presets import get_preset
    from vitrail.pretrained import build_from_timm
    from vitrail.report import write_report
    from vitrail.run import load_run
    from vitrail.train import resume, train
    from vitrail.vit import VisionTransformer

__all__ = [
    "Classifier",
    "RunConfig",
    "VisionTransformer",
    "build_from_timm",
    "compare",
    "evaluate",
    "explain",
    "explain_picture",
    "get_preset",
    "load",
    "load_run",
    "resume",
    "train",
    "write_report",
]

_HOMES = {
    "Classifier": "predict",
    "RunConfig": "config",
    "VisionTransformer": "vit",
    "build_from_timm": "pretrained",
    "compare": "compare",
    "evaluate": "evaluate",
    "explain": "explain",
    "explain_picture": "explain",
    "get_preset": "presets",
    "load": "predict",
    "load_run": "run",
    "resume": "train",
    "train": "train",
    "write_report": "report",
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
