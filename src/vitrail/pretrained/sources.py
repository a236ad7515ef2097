"""Where weights come from: a run of ours, timm's names and files, Hugging Face's ViT, Google's .npz."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitrail.checkpoint import load_tensors, refuse_pickle
from vitrail.errors import VitrailError
from vitrail.pretrained.google import read_google
from vitrail.pretrained.weights import Weights, check_tensors, fuse_qkv, import_timm, rename
from vitrail.run import list_bundled, load_run

TIMM, TIMM_POOLS = "timm:", {"token": "cls", "avg": "mean"}
# The names in Hugging Face's files, then those that transformers 5 has in memory for the same.
HUGGING_FACE = (
    (r"^vit\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def read_weights(source: str) -> Weights:
    """Read a model's weights from anywhere `--init-from` may name. Nothing is ever unpickled.

    Raises:
        VitrailError: if there is nothing, or it is not such weights, or it is a pickle.
    """
    if source.startswith(TIMM):
        return _read_hub(source)
    path = Path(source)
    if not path.exists() and source not in list_bundled():
        raise VitrailError(
            f"no weights at {source}: expected a run folder, a checkpoint in one, a model that ships "
            f"({', '.join(list_bundled())}), timm:NAME, a .safetensors file in timm's names, a folder of timm's or of "
            "Hugging Face's ViT, or an .npz of Google's"
        )
    if path.is_file():
        return _read_file(path)
    config = _read_json(path / "config.json")
    if "model_type" in config:
        return _read_hugging_face(path, config)
    if "architecture" in config:
        return _read_timm_folder(path, config)
    return _read_run(source)


def _read_file(path: Path) -> Weights:
    refuse_pickle(path)
    if path.suffix == ".npz":
        return read_google(path)
    if path.suffix != ".safetensors":
        raise VitrailError(f"{path} is neither a .safetensors file nor an .npz of Google's; see --init-from")
    return Weights(str(path), _check_timm(path, load_tensors(path)))


def _read_run(source: str) -> Weights:
    """The averaged weights of a run of ours if it has any, else the last."""
    run = load_run(source)
    state, config, pre = run.load_model().state_dict(), run.config, run.config.preprocessing
    projection, side = state.get("patch_embed.proj.weight"), config.model.patch_size
    if projection is not None and projection.ndim == 2:
        state["patch_embed.proj.weight"] = projection.unflatten(1, (pre.num_channels, side, side))
    is_vit = "blocks.0.attn.qkv.weight" in state
    num_heads, pool = (config.model.num_heads, config.model.pool) if is_vit else (None, None)
    val_cut = config.input.val_cut(config.seed)
    return Weights(source, state, num_heads, pool, config.classes, pre.mean, pre.std, val_cut)


def _read_hub(source: str) -> Weights:
    """A timm model's weights from the Hugging Face hub, or from its cache on this machine."""
    timm, name = import_timm(source), source.removeprefix(TIMM)
    model = _build_timm(source, name)
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag that timm does not know
        raise VitrailError(f"{source}: {error}; see timm.list_pretrained('{name.split('.')[0]}*')") from error
    if config is None or not config.hf_hub_id:
        raise VitrailError(f"{source}: timm knows the model but no weights of it on the hub")
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    from safetensors import SafetensorError

    try:
        # Asked for by this name it is safetensors or nothing: timm would else fall back to a pickle.
        state = timm.models.load_state_dict_from_hf(config.hf_hub_id, "model.safetensors")
    except (OSError, EntryNotFoundError, HfHubHTTPError, SafetensorError) as error:
        raise VitrailError(
            f"{source}: cannot fetch model.safetensors of {config.hf_hub_id} from the hub: {error}; "
            "or fetch its folder elsewhere and give its path"
        ) from error
    return _from_timm(source, state, model, config.to_dict())


def _read_timm_folder(path: Path, config: Mapping[str, Any]) -> Weights:
    """A folder as timm saves it and the hub keeps it: config.json and model.safetensors."""
    model = _build_timm(str(path), str(config["architecture"]))
    found = _from_timm(str(path), load_tensors(_find_safetensors(path)), model, config.get("pretrained_cfg"))
    # Arguments beside the architecture's own are not passed on: they could name any file to be read.
    arguments = config.get("model_args")
    if isinstance(arguments, dict):
        given, pool = arguments.get("num_heads"), TIMM_POOLS.get(str(config.get("global_pool")))
        found = replace(found, num_heads=given if isinstance(given, int) else None, pool=pool)
    return found


def _build_timm(source: str, name: str) -> Any:
    """timm's model of that name, without memory for its weights: for what they do not tell."""
    import torch

    timm = import_timm(source)
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models("*vit*"), 3)
        raise VitrailError(f"{source}: timm has no model '{name}'" + (f"; do you mean {', '.join(near)}?" * bool(near)))
    with torch.device("meta"):
        model = timm.create_model(name.split(".", maxsplit=1)[0])
    plain = isinstance(model, timm.models.VisionTransformer)
    if not plain or not isinstance(model.blocks[0].mlp.act, nn.GELU):
        what = "its GELU is another" if plain else type(model).__name__
        raise VitrailError(f"{source} is not a plain Vision Transformer ({what}); give one, such as vit_*")
    return model


def _from_timm(source: str, state: Mapping[str, Tensor], model: Any, pretrained: Any) -> Weights:
    """With the number of heads and the pooling of `model`, and the mean and std told by timm's `pretrained` config."""
    mean, std = (_numbers(pretrained.get(k)) if isinstance(pretrained, dict) else None for k in ("mean", "std"))
    num_heads, pool = model.blocks[0].attn.num_heads, TIMM_POOLS.get(model.global_pool, "otherwise")
    return Weights(source, _check_timm(source, state), num_heads, pool, None, mean, std)


def _check_timm(source: str | Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    projection = state.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4:
        raise VitrailError(
            f"{source} is not a ViT in timm's names: patch_embed.proj.weight [D, C, P, P] is not in it, but "
            f"{', '.join(list(state)[:3]) or 'nothing'}; of a vitrail run or of Hugging Face's model give the folder"
        )
    return check_tensors(source, state)


def _read_hugging_face(path: Path, config: Mapping[str, Any]) -> Weights:
    """A folder that `ViTForImageClassification` or `ViTModel` was saved in.

    Its layer norms add 1e-12 to the variance, ours 1e-6: the logits still agree to 1e-4.
    """
    kind, activation, num_heads = (config.get(k) for k in ("model_type", "hidden_act", "num_attention_heads"))
    if kind != "vit" or activation != "gelu" or not isinstance(num_heads, int):
        raise VitrailError(
            f"{path / 'config.json'} tells of model_type {kind!r}, hidden_act {activation!r}, num_attention_heads "
            f"{num_heads!r}; expected 'vit', 'gelu' and a number"
        )
    state = check_tensors(path, load_tensors(_find_safetensors(path)))
    state = fuse_qkv({rename(name, HUGGING_FACE): tensor for name, tensor in state.items()})
    pixels = _read_json(path / "preprocessor_config.json")
    labels = config.get("id2label")
    classes = tuple(map(str, labels.values())) if isinstance(labels, dict) else ()
    # What transformers calls classes that nobody named.
    named = bool(classes) and not all(re.fullmatch(r"LABEL_\d+", label) for label in classes)
    mean, std = _numbers(pixels.get("image_mean")), _numbers(pixels.get("image_std"))
    return Weights(str(path), state, num_heads, "cls", classes if named else None, mean, std)


def _find_safetensors(folder: Path) -> Path:
    """The weights in a folder of timm's or Hugging Face's. Raises VitrailError if there are none, or a pickle alone."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        for other in sorted(folder.iterdir()):
            refuse_pickle(other)
        raise VitrailError(f"{folder} has no model.safetensors; expected the weights there, in one file")
    return weights


def _numbers(values: Any) -> tuple[float, ...] | None:
    """Means or deviations of the channels out of a JSON file, if they are that."""
    good = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
    return tuple(map(float, values)) if good else None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object, empty if there is no such file."""
    try:
        values = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise VitrailError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise VitrailError(f"{path} holds no JSON object; expected the one saved with the weights")
    return values
