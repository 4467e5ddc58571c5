"""For MkDocs: pages and records beside docs/ become part of the site, and links follow them.

A page that a browser could not show without the network stops the build.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BESIDE = ("*.md", "benchmarks/**/*.md", "benchmarks/**/*.json", "benchmarks/**/*.png",
          "examples/*.py", "squeezed/demo/README.md")  # fmt: skip
LINK = re.compile(r"\]\(([^)\s#]+)")
FETCHED = re.compile(r"""<(?:[^>]+\ssrc|link\s[^>]*href)=["']((?:https?:)?//[^"']+)""")
"""What a browser loads by itself, such as a font or a picture: not what a reader clicks on."""
README = ("README.md", "project.md")
"""The project's README on the site, where README.md is the overview of docs/."""


def on_files(files, config):
    for pattern in BESIDE:
        for path in ROOT.glob(pattern):
            source = path.relative_to(ROOT).as_posix()
            found = File.generated(config, site_place(source), abs_src_path=str(path))
            files.append(found)
    return files


def on_page_markdown(markdown, page, config, files):
    here = in_repository(page.file.src_uri)

    def moved(match):
        if "://" in match[1]:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[1]))
        place = posixpath.dirname(page.file.src_uri) or "."
        return f"]({posixpath.relpath(site_place(target), place)}"

    return LINK.sub(moved, markdown)


def on_post_page(output, page, config):
    for address in FETCHED.findall(output):
        raise PluginError(f"{page.file.src_uri}: loads {address}; expected a file of the site")
    return output


def site_place(source):
    """Where a file of the repository lies among the site's sources."""
    return README[1] if source == README[0] else source.removeprefix("docs/")


def in_repository(place):
    """The other way round."""
    if place == README[1]:
        return README[0]
    return f"docs/{place}" if (ROOT / "docs" / place).exists() else place
