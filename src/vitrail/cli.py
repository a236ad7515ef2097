"""The command line's front door: which verb, and what becomes of errors, warnings and Ctrl-C."""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from vitrail.errors import Interrupted, VitrailError, VitrailWarning
from vitrail.verbs import VERBS
from vitrail.verbs.speak import say, show_table

HELP = """\
vitrail: Vision Transformers for small images, from scratch, that one can see through.

  vitrail train    [PRESET] --data SOURCE --out RUN       train; --resume goes on with a run exactly
  vitrail evaluate MODEL [--data SOURCE] [--split test]   accuracy with an interval, per class, confusion, calibration
  vitrail predict  [--model MODEL] IMAGE...               the likeliest classes of each picture
  vitrail explain  MODEL IMAGE [--out FIG.png]            where each head looks; rollout; the evidence for a class
  vitrail report   MODEL [--out REPORT.html]              one page: curves, errors, the paper's figures, trust
  vitrail bench    [--minutes 5]                          this machine's speed, beside other libraries and its limit
  vitrail compare  QUESTION --data SOURCE --out DIR       what is said of ViTs, measured: data, regularisation,
                                                          transfer, scale, against a ResNet of the same size
  vitrail verify-resume RUN                               whether a killed and resumed run of this kind is exact here

PRESET is one of {presets}. SOURCE is digits, cifar10, a folder of images
(train/<class>/*.png, optional val/ and test/) or a folder of Hugging Face parquet files.
MODEL is a run folder, a checkpoint in one, or cifar10, which ships with vitrail.

  vitrail VERB --help    all flags of a verb, with defaults, units and meaning
  --json                 print the result as one JSON object
  --debug                show the traceback of an error
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 2 wrong input, 130 by Ctrl-C, 143 by SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    warnings.showwarning = _show_warning
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            _print_help()
            return 0
        if arguments[0] not in VERBS:
            raise VitrailError(f"no verb '{arguments[0]}'; give one of {', '.join(VERBS)}")
        VERBS[arguments[0]](arguments[1:])
    except VitrailError as error:
        if debug:
            raise
        say(f"error: {error}")
        if error.table:
            show_table(error.table[0], error.table[1:], stderr=True)
        return 2
    except Interrupted as stop:
        say(str(stop))
        return 128 + stop.signal
    except KeyboardInterrupt:
        if debug:
            raise
        say("interrupted; nothing more was saved")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`vitrail … | head`); keep the interpreter from saying so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _print_help() -> None:
    from vitrail.presets import PRESETS

    print(HELP.format(presets=", ".join(PRESETS)), flush=True)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    if issubclass(category, VitrailWarning):
        say(f"warning: {message}")
    else:
        print(warnings.formatwarning(message, category, filename, lineno), file=sys.stderr)
