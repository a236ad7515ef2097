"""`python -m vitrail`."""

import sys

from vitrail.cli import main

code = main()
# A Ctrl-C that met code compiled from text (a dataclass being made, as torch's import does) leaves CPython a note to
# die of the signal at exit, caught or not, where a module was run by -m. Running any text takes the note back.
exec("")
sys.exit(code)
