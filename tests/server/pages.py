"""The blocks of code of the pages about the server, made to run against one that is here."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("serve-*.md"))
ADDRESS = "http://localhost:8000"


def text_of(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", text_of(name), re.DOTALL)


def commands(name):
    return [command for block in blocks(name, "sh") for command in commands_in(block)]


def commands_in(block):
    """Commands in order; a quoted text may go over several lines."""
    found, whole = [], ""
    for line in block.splitlines():
        whole += line
        try:
            shlex.split(whole)
        except ValueError:  # a quotation goes on
            whole += "\n"
            continue
        found.append(whole)
        whole = ""
    assert not whole, whole
    return found


def program(command):
    """What a command runs, without the variables before it."""
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    return words[0].partition("=")[0]
