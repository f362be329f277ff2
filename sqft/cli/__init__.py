"""The commands: each parses its arguments, calls the library and prints.

Exit status 0: done. 2: an error that the user can fix, in one message. 130: interrupted; the same
command resumes. 143: the same, by SIGTERM. 1: a bug of sqft, with its traceback.
"""

from sqft.cli.group import main

__all__ = ["main"]
