"""Exit codes, and how an error is told: in one sentence, on stderr.

The parser is the standard library's. It hands its errors over as sentences, needs no extra package, and is imported in
a few milliseconds.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

# argparse ends with 2 for a wrong command line, and shells give 128 + 2 to what SIGINT has ended.
OK, FAILED, USER_ERROR, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = """exit codes:
  0    done
  1    an audit failed, or cells of a sweep have no result
  2    a wrong option, value or file, or a run folder that cannot be used, in one sentence
  3    the loss was not finite; the run folder keeps what was done
  130  interrupted by Ctrl-C, SIGTERM or SIGHUP"""


def complain(message: str, code: int = USER_ERROR) -> int:
    """Write an error to stderr, and return its exit code."""
    # Not on stdout, which holds results and may go into a file.
    print(f"sharpkern: {message}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Raises one sentence for a wrong command line, and ends every help with the exit codes."""

    def __init__(self, **keywords: Any) -> None:
        # No abbreviations: what is unambiguous today may not be once there are more options.
        super().__init__(**keywords, epilog=EXIT_CODES, allow_abbrev=False)
        # The table of exit codes keeps its lines. Set here, because every command's parser is made by this class too.
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; see {self.prog} --help.")
