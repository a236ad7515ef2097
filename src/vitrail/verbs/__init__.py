"""What each verb does: read its flags, call, print.

Every verb's libraries are imported when it runs, so that `vitrail --help` answers at once.
"""

from collections.abc import Callable

from vitrail.verbs.measuring import run_bench, run_evaluate, run_explain, run_predict, run_report
from vitrail.verbs.training import run_compare, run_train, run_verify_resume

VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "explain": run_explain,
    "report": run_report,
    "compare": run_compare,
    "bench": run_bench,
    "verify-resume": run_verify_resume,
}
"""What to call with the arguments after each verb."""
