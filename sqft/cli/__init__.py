"""The commands: parse, call, print.

Exit status 0: done. 2: something the user can mend, in one message. 130: interrupted; the same
command resumes. 1: a bug of sqft, with its traceback.
"""

from sqft.cli import looking, plugins, runs, start
from sqft.cli.group import main

__all__ = ["looking", "main", "plugins", "runs", "start"]
