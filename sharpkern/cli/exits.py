"""Exit codes, and how an error is told: in one sentence, on stderr."""

from __future__ import annotations

import sys

# typer ends with 2 for a wrong command line, and shells give 128 + 2 to what SIGINT has ended.
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
