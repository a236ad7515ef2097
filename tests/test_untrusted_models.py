"""Models that mean harm, or are merely broken: pickles, weights and configs from elsewhere. None gets through."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vitrail.checkpoint import PICKLES
from vitrail.cli import main
from vitrail.errors import VitrailError
from vitrail.run import Run, load_run
from vitrail.verbs import VERBS

ROOT = Path(__file__).parent.parent


class Canary:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def hostile_files(folder: Path, canary: Path) -> list[Path]:
    """One of each kind, each of which writes `canary` when it is unpickled."""
    folder.mkdir()
    torch.save({"weight": Canary(canary)}, folder / "zip.pt")
    torch.save(Canary(canary), folder / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("weights.pkl", "pytorch_model.bin", "last.ckpt", "model.safetensors.pickle"):
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    np.save(folder / "array.npy", np.array([Canary(canary)]), allow_pickle=True)
    return sorted(folder.iterdir())


def test_pickle_canary(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given to every verb, in every place where it takes a file: refused in one line, and the canary is not there."""
    canary, picture = tmp_path / "canary", str(ROOT / "docs/examples/five.png")
    model, out = str(trained.folder), str(tmp_path / "out")
    for file in map(str, hostile_files(tmp_path / "hostile", canary)):
        uses = {
            "train": [["tiny", "--data", file, "--out", out], ["--resume", "--out", file], ["--init-from", file]],
            "evaluate": [[file], [model, "--data", file]],
            "predict": [["--model", file, picture], ["--model", model, file]],
            "explain": [[file, picture], [model, file]],
            "report": [[file, "--out", out], [model, "--data", file, "--out", out]],
            "compare": [["data", "--data", file, "--out", out]],
            "verify-resume": [[file]],
            "bench": [],
        }
        assert uses.keys() == VERBS.keys()
        for verb, calls in uses.items():
            for arguments in calls:
                assert main([verb, *arguments]) == 2, (verb, arguments)
                assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
        with pytest.raises(VitrailError, match="is a pickle, which can run any code when it is read"):
            load_run(file)
    assert not canary.exists()
    pickle.loads((tmp_path / "hostile" / "weights.pkl").read_bytes())
    assert canary.exists()  # so that the test could have failed


def test_pickle_canary_in_the_place_of_weights(trained: Run, tmp_path: Path) -> None:
    """A pickle under the name of safetensors is read as such, and is none."""
    canary = tmp_path / "canary"
    (tmp_path / "config.json").write_text((trained.folder / "config.json").read_text())
    for content in (pickle.dumps(Canary(canary)), (hostile_files(tmp_path / "hostile", canary)[-1]).read_bytes()):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(VitrailError, match=r"cannot read .*model\.safetensors"):
            load_run(tmp_path).load_model()
    assert not canary.exists()


def test_no_pickle_is_read_or_written_by_the_source() -> None:
    """But for the one unpickler of CIFAR-10's archive, which builds nothing."""
    pattern = re.compile(r"torch\.(load|save)\(|\bpickle\b|allow_pickle(?!=False)|joblib|marshal|shelve")
    found = {
        path.relative_to(ROOT / "src/vitrail").as_posix(): {m[0] for m in pattern.finditer(path.read_text())}
        for path in (ROOT / "src").rglob("*.py")
        if pattern.search(path.read_text())
    }
    cifar = found.pop("data/cifar.py")
    assert cifar == {"pickle"}
    refusal = found.pop("checkpoint.py")  # which names torch.load in the line that it tells people
    assert refusal <= {"pickle", "torch.load("}
    assert {word for words in found.values() for word in words} <= {"pickle"}  # in a comment: "no pickle"
    assert all("import pickle" not in (ROOT / "src/vitrail" / name).read_text() for name in found)


def mutate(sound: bytes, draw: random.Random) -> bytes:
    """A safetensors file with something wrong: bits, length, the header's length, or the header's JSON."""
    header_size = int.from_bytes(sound[:8], "little")
    kind = draw.randrange(5)
    if kind == 0:
        changed = bytearray(sound)
        for _ in range(draw.choice([1, 5, 50])):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 1:
        return sound[: draw.randrange(len(sound))]
    if kind == 2:
        size = draw.choice([0, 1, header_size + draw.randrange(-9, 9), 2**31, 2**63, 2**64 - 1])
        return size.to_bytes(8, "little") + sound[8:]
    header: dict[str, Any] = json.loads(sound[8 : 8 + header_size])
    name = draw.choice([name for name in header if name != "__metadata__"])
    if kind == 3:
        header[name] |= draw.choice(
            [
                {"shape": [2**40, 2**40]},
                {"shape": [-1]},
                {"shape": [10**9]},
                {"shape": list(reversed(header[name]["shape"]))},
                {"dtype": draw.choice(["F64", "I8", "BOOL", "X9", 7])},
                {"data_offsets": [0, 2**62]},
                {"data_offsets": [draw.randrange(9999), draw.randrange(9999)]},
            ]
        )
    else:
        header[draw.choice(["", name + "x", "head.weight"])] = header.pop(name)
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + sound[8 + header_size :]


@pytest.mark.slow
def test_safetensors_fuzz(trained: Run, tmp_path: Path) -> None:
    """1,000 mutations: each is a model of the right shapes or a clean error, soon and in little memory."""
    sound, draw, refusals = trained.weights.read_bytes(), random.Random(0), list[str]()
    (tmp_path / "config.json").write_text((trained.folder / "config.json").read_text())
    shapes = {name: tensor.shape for name, tensor in load_file(trained.weights).items()}
    memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for _ in range(1000):
        (tmp_path / "model.safetensors").write_bytes(mutate(sound, draw))
        try:
            model = load_run(tmp_path).load_model()
            assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
        except VitrailError as error:
            refusals.append(str(error))
    assert len(refusals) > 500
    assert all("model.safetensors" in said and len(said) < 1000 for said in refusals)
    assert time.monotonic() - began < 240
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # KiB


def test_weights_that_do_not_fit_are_named_with_both_shapes(trained: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((trained.folder / "config.json").read_text())
    state = load_file(trained.weights)
    save_file(state | {"blocks.1.mlp.fc1.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(VitrailError, match=r"blocks\.1\.mlp\.fc1\.weight is \[3, 4\] there, \[128, 64\] by the config"):
        load_run(tmp_path).load_model()
    save_file(state | {"extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(VitrailError, match=r"extra is \[1\] there, nothing by the config"):
        load_run(tmp_path).load_model()
    save_file(state | {"head.bias": torch.zeros(10, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(VitrailError, match=r"head\.bias is \[10\] of whole numbers there, \[10\] by the config"):
        load_run(tmp_path).load_model()


GARBAGE = [None, True, -1, 0, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "x" * 10_000, [], [[]], {}, {"a": 1}]


def leaves(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON object, inner ones too."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path, *(found for key, value in inner for found in leaves(value, (*path, key)))]


def test_a_hostile_config_is_refused_soon(trained: Run, tmp_path: Path) -> None:
    """Garbage in the place of every value of config.json: a model all the same, or a clean error, soon."""
    original = (trained.folder / "config.json").read_text()
    (tmp_path / "model.safetensors").write_bytes(trained.weights.read_bytes())
    began, refused = time.monotonic(), 0
    for path in leaves(json.loads(original)):
        for garbage in GARBAGE:
            config = json.loads(original)
            place = config
            for key in path[:-1]:
                place = place[key]
            if path:
                place[path[-1]] = garbage
            (tmp_path / "config.json").write_text(json.dumps(config if path else garbage))
            try:
                load_run(tmp_path).load_model()
            except VitrailError:
                refused += 1
    assert refused > 600
    assert time.monotonic() - began < 120
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(VitrailError, match="is not valid JSON"):
        load_run(tmp_path)


@pytest.mark.parametrize("suffix", PICKLES)
def test_a_refusal_tells_how_to_convert(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path / f"weights{suffix.upper()}")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    weights = tmp_path / "weights"
    assert said.endswith(f'sys.argv[2])" {weights}{suffix.upper()} {weights}.safetensors\n')


def test_the_command_that_converts_is_safe_to_paste(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file's name does not get to run in the shell of whoever follows the advice; the advice works."""
    canary = tmp_path / "canary"
    for name in (f"$(touch {canary.name}).pt", f"`touch {canary.name}`.pt", f'"; touch {canary.name}; ".pt'):
        file = tmp_path / name
        torch.save({"weight": torch.ones(2)}, file)
        assert main(["evaluate", str(file)]) == 2
        command = capsys.readouterr().err.split("convert it: ")[1].replace("python ", f"{sys.executable} ", 1)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert not canary.exists()
        assert load_file(file.with_suffix(".safetensors"))["weight"].tolist() == [1, 1]


def test_hostile_files_beside_the_weights(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics, environment and states that are not what vitrail writes: one line, from every verb that reads them."""
    run = shutil.copytree(trained.folder, tmp_path / "run")
    for name, contents in (
        ("metrics.jsonl", ("[1]", '{"step": 1}', "{no json", "[" * 100_000, '{"step": "x"}')),
        ("environment.json", ("[1]", '{"command": 7}', "{no json", '{"command": [1]}')),
    ):
        sound = (run / name).read_text()
        for content in contents:
            (run / name).write_text(content)
            assert main(["report", str(run), "--out", str(tmp_path / "page.html"), "--quiet"]) == 2, content
            assert name in capsys.readouterr().err.splitlines()[-1]
        (run / name).write_text(sound)
    save_file(load_file(run / "model.safetensors") | {"head.weight": torch.tensor(1.0)}, run / "model.safetensors")
    with pytest.raises(VitrailError, match=r"head\.weight is \[\] there, \[10, 64\] by the config"):
        load_run(run).load_model()
