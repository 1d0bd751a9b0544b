"""The directive ``{help-of} COMMAND``: what ``sharpkern COMMAND --help`` prints at the time of the build."""

from __future__ import annotations

import contextlib
import io
import os

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from sharpkern.cli import main


class HelpOf(Directive):
    """A literal block with a command's help; without a command, that of ``sharpkern``."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Run the command line in this process."""
        os.environ["COLUMNS"] = "100"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main([*self.arguments, "--help"])
        text = printed.getvalue()
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("help-of", HelpOf)
    return {"parallel_read_safe": True}
