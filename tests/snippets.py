"""The Python of Markdown files, run as it stands."""

import contextlib
import io
import pathlib
import re

_FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)
_INCLUDE = re.compile(
    r"```\{include\} (?P<file>\S+)\n"
    r'(?::start-after: "(?P<after>.*)"\n)?'
    r'(?::end-before: "(?P<before>.*)"\n)?```'
)


def snippets(text):
    """The fenced blocks of Python in a text."""
    return _FENCE.findall(text)


def expanded(path):
    """The text of a page, with the files (or the parts of them) that it includes."""

    def included(match):
        text = (path.parent / match["file"]).read_text()
        if match["after"]:
            text = text.split(match["after"], 1)[1]
        if match["before"]:
            text = text.split(match["before"], 1)[0]
        return text

    return _INCLUDE.sub(included, path.read_text())


def run(blocks, path):
    """Runs blocks in one namespace; returns it, and what they printed."""
    scope: dict = {"__name__": pathlib.Path(path).stem}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for block in blocks:
            exec(compile(block, str(path), "exec"), scope)
    return scope, out.getvalue()
