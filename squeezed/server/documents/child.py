"""A process that turns one uploaded file into text, and can do nothing else for long.

Run by its path, with nothing of this package imported: `child.py KIND FILE SECONDS MEMORY_MB
CHARACTERS`. Text goes to standard output in UTF-8; a line on standard error says what is wrong.
"""

import sys
from html.parser import HTMLParser

WRONG, TOO_MUCH = 3, 4
"""Exit statuses: the file is not what it should be, or holds too much."""

BLOCKS = set(
    "address article aside blockquote br dd div dl dt figcaption footer form h1 h2 h3 h4 h5 h6 "
    "header hr li main nav ol p pre section table td th tr ul title".split()
)
HIDDEN = {"script", "style", "template", "noscript", "svg", "math"}
LARGEST_UNZIPPED = 1 << 28
MOST_ZIPPED = 5000
LONGEST_ERROR = 1 << 16


class TooMuch(Exception):
    pass


class Text:
    """What was read so far, of at most so many characters."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.parts: list[str] = []

    def add(self, part: str) -> None:
        self.most -= len(part)
        if self.most < 0:
            raise TooMuch("it holds more text than is allowed")
        self.parts.append(part)


class Page(HTMLParser):
    """The words of an HTML page; scripts and styles are none."""

    def __init__(self, text: Text) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.hidden = text, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in HIDDEN:
            self.hidden += 1
        elif tag in BLOCKS:
            self.text.add("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in HIDDEN:
            self.hidden = max(0, self.hidden - 1)
        elif tag in BLOCKS:
            self.text.add("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text.add(data)


def read_html(path: str, text: Text) -> None:
    page = Page(text)
    with open(path, encoding="utf-8-sig") as stream:
        while piece := stream.read(1 << 16):
            page.feed(piece)
    page.close()
    lines = (" ".join(line.split()) for line in "".join(text.parts).split("\n"))
    kept, blank = [], False
    for line in lines:
        if line or not blank:
            kept.append(line)
        blank = not line
    text.parts = ["\n".join(kept).strip()]


def read_pdf(path: str, text: Text) -> None:
    import pypdf

    reader = pypdf.PdfReader(path, strict=False)
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("the PDF file is encrypted; save it without a password")
    for page in reader.pages:
        text.add(page.extract_text() + "\n\n")
    if not "".join(text.parts).strip():
        raise ValueError("the PDF file holds no text, only pictures; run OCR over it first")


def read_docx(path: str, text: Text) -> None:
    check_zip(path)
    import docx
    from docx.table import Table

    document = docx.Document(path)
    for block in document.iter_inner_content():
        if isinstance(block, Table):
            for row in block.rows:
                text.add(" | ".join(cell.text.strip() for cell in row.cells) + "\n")
        else:
            text.add(block.text + "\n")
        text.add("\n")


def check_zip(path: str) -> None:
    """Raise unless what a zip file says that it holds is of a decent size."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        inside = archive.infolist()
    if len(inside) > MOST_ZIPPED or sum(entry.file_size for entry in inside) > LARGEST_UNZIPPED:
        raise TooMuch("it unpacks to more than is allowed")


READERS = {"html": read_html, "pdf": read_pdf, "docx": read_docx}


def limit(seconds: int, megabytes: int, written: int) -> None:
    import resource

    memory = megabytes << 20
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, written),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def main(kind: str, path: str, seconds: str, megabytes: str, characters: str) -> int:
    limit(int(seconds), int(megabytes), 4 * int(characters) + LONGEST_ERROR)
    text = Text(int(characters))
    try:
        READERS[kind](path, text)
        sys.stdout.buffer.write("".join(text.parts).encode("utf-8", "replace"))
        sys.stdout.flush()
    except (TooMuch, MemoryError, RecursionError) as error:
        print(error or "it needs too much memory", file=sys.stderr)
        return TOO_MUCH
    except Exception as error:
        print(" ".join(str(error).split())[:200] or type(error).__name__, file=sys.stderr)
        return WRONG
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
