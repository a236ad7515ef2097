"""What the READMEs tell people to type is what the command line takes, and the links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from vitrail.flags import (
    BenchFlags,
    CompareFlags,
    EvaluateFlags,
    ExplainFlags,
    PredictFlags,
    ReportFlags,
    TrainFlags,
    VerifyResumeFlags,
)
from vitrail.verbs.speak import parse
from vitrail.verbs.training import preset_config, take_preset

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.ko.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = sorted(
    {
        (page.name, line)
        for page in PAGES
        for line in re.findall(
            r"vitrail ((?:train|evaluate|predict|explain|report|bench|compare|verify-resume) [^`#\n]*)",
            page.read_text(),
        )
    }
)


def test_there_are_commands_to_check() -> None:
    assert {"README.md", "README.ko.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page: str, command: str) -> None:
    verb, *arguments = shlex.split(command)
    if "--help" in arguments:
        return
    if verb == "train":
        preset, arguments = take_preset(arguments)
        flags = parse(TrainFlags, verb, arguments, TrainFlags(preset_config(preset)))
        assert flags.resume or flags.config.data
    else:
        kinds = {
            "evaluate": EvaluateFlags,
            "predict": PredictFlags,
            "explain": ExplainFlags,
            "report": ReportFlags,
            "bench": BenchFlags,
            "compare": CompareFlags,
            "verify-resume": VerifyResumeFlags,
        }
        parse(kinds[verb], verb, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_both_readmes_begin_with_demo_and_test() -> None:
    for name in ("README.md", "README.ko.md"):
        first_block = (ROOT / name).read_text().split("```sh\n")[1].split("```")[0]
        assert [line.split("#")[0].strip() for line in first_block.strip().splitlines()] == ["make demo", "make test"]
