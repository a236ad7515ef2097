"""Named recipes: the defaults that flags override. No torch here.

What each one reaches, or that it was not measured, stands in the README; each run's command in docs/benchmarks.md.
"""

from functools import partial

from vitrail.config import AugmentConfig, ModelConfig, OptimConfig, RunConfig
from vitrail.errors import VitrailError

DEFAULT_PRESET = "quick"
# What all recipes share: heads that begin on a patch nearby, blocks that begin by adding nothing.
local_vit = partial(ModelConfig, rel_pos="neighbour", init="zero_residual")

PRESETS: dict[str, RunConfig] = {
    "tiny": RunConfig(
        preset="tiny",
        data="digits",
        budget="40s",
        model=local_vit(patch_size=2, embed_dim=64, depth=4, num_heads=8),
        optim=OptimConfig(batch_size=64, lr=2e-3, muon_lr=0.01),
        augment=AugmentConfig(crop_padding=1, flip=False),
    ),
    "minute": RunConfig(
        preset="minute",
        budget="1min",
        model=local_vit(embed_dim=64, depth=4, num_heads=4),
        optim=OptimConfig(lr=4e-3, muon_lr=0.02, muon_weight_decay=0.1, coarse_fraction=0.65),
    ),
    "quick": RunConfig(
        preset="quick",
        budget="10min",
        model=local_vit(embed_dim=64, num_heads=4),
        optim=OptimConfig(batch_size=64, muon_lr=0.01, muon_weight_decay=0.1, coarse_fraction=0.65),
        augment=AugmentConfig(crop_padding=2),
    ),
    "hour": RunConfig(
        preset="hour",
        budget="60min",
        model=local_vit(embed_dim=128, num_heads=4),
        optim=OptimConfig(muon_lr=0.007, muon_weight_decay=0.1, coarse_fraction=0.3, ema_decay=0.998),
        augment=AugmentConfig(policy="randaugment", erasing=0.25),
    ),
    "best": RunConfig(
        preset="best",
        budget="140epochs",
        model=local_vit(embed_dim=160, num_heads=4),
        optim=OptimConfig(muon_lr=0.007, muon_weight_decay=0.1, coarse_fraction=0.11, ema_decay=0.999),
        augment=AugmentConfig(policy="randaugment", erasing=0.25, mixup=0.2, cutmix=1.0, mix_fraction=0.928),
    ),
    # Not measured: what `best` would be with a hundred times its operations.
    "gpu": RunConfig(
        preset="gpu",
        budget="1000epochs",
        model=local_vit(embed_dim=384, depth=9, num_heads=6, mlp_ratio=4.0, drop_path_rate=0.1),
        optim=OptimConfig(batch_size=512, muon_lr=0.01, muon_weight_decay=0.1, ema_decay=0.9999),
        augment=AugmentConfig(policy="randaugment", erasing=0.25, mixup=0.8, cutmix=1.0),
    ),
}


def get_preset(name: str) -> RunConfig:
    """The recipe called `name`. Raises VitrailError naming those there are."""
    if name not in PRESETS:
        raise VitrailError(f"no preset '{name}'; give one of {', '.join(PRESETS)}")
    return PRESETS[name]
