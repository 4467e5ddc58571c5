"""Text from anywhere: what can be encoded, what bytes are text, what a terminal may be sent."""

from __future__ import annotations

import os
import re

from squeezed.errors import SqueezedError, expect

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal acts on instead of showing them; tabs and line ends are text."""

SIGNATURES = (
    (b"%PDF-", "a PDF file", "extract its text first, as in pdftotext FILE FILE.txt"),
    (b"\x1f\x8b", "a gzip file", "unpack it first, as in gunzip FILE"),
    (b"BZh", "a bzip2 file", "unpack it first, as in bunzip2 FILE"),
    (b"\xfd7zXZ\x00", "an xz file", "unpack it first, as in unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it first, as in unzstd FILE"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip file", "unpack it first"),
    (b"PK\x03\x04", "a zip, DOCX, ODT or EPUB file", "extract its text first"),
    (b"\xd0\xcf\x11\xe0", "an old Office file", "save it as plain text first"),
    (b"\x89PNG", "a PNG picture", "name a text file"),
    (b"\xff\xd8\xff", "a JPEG picture", "name a text file"),
    (b"GIF8", "a GIF picture", "name a text file"),
    (b"\x7fELF", "a program", "name a text file"),
    (b"SQLite format 3\x00", "an SQLite database", "name a text file"),
    (b"GGUF", "a GGUF model", "name a text file, and the model with --model"),
)
UTF32 = ((b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"))
UTF16 = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def check_text(name: str, text: object) -> str:
    """Return `text` if it is a string that can be encoded.

    Half of a surrogate pair, which extracted PDF text may hold, is no character: it is refused,
    not replaced, for a document must not change in silence.

    Raises:
        SqueezedError: no string, or a lone surrogate, with its place.
    """
    given: str = expect(name, text, str, "text (str)")
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        line = given.count("\n", 0, error.start) + 1
        raise SqueezedError(
            f"{name}: character {error.start:,} (line {line:,}) is half of a surrogate pair "
            f"(U+{ord(given[error.start]):04X}), which is no text; mend it with "
            'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
        ) from error
    return given


def text_of_argument(name: str, text: str) -> str:
    """A word of the command line as text: bytes that the locale could not read are read as UTF-8.

    Raises:
        SqueezedError: they are not UTF-8 either.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return decoded(name, os.fsencode(text), "it")
        except UnicodeEncodeError:
            return check_text(name, text)
    return text


def decoded(name: str, data: bytes, source: str) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Args:
        name: of the argument, for the error.
        source: the file, or what else the bytes are, for the error.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SqueezedError(
            f"{name}: {source} is not UTF-8 text (byte {error.start:,} is "
            f"0x{data[error.start]:02X}); convert it first, as in iconv -f latin1 -t utf-8"
        ) from error


def text_of_file(name: str, data: bytes, source: str) -> str:
    """Decode a whole file in UTF-8; see `decoded`.

    Raises:
        SqueezedError: another encoding or a file of another kind; the remedy fits what it is.
    """
    encoding = _wide_encoding(data)
    if encoding:
        raise SqueezedError(
            f"{name}: {source} is {encoding.upper()} text, expected UTF-8; convert it first, as in "
            f"iconv -f {encoding} -t utf-8"
        )
    for start, kind, remedy in SIGNATURES:
        if data.startswith(start) and (start == b"%PDF-" or not _may_be_text(data)):
            raise SqueezedError(f"{name}: {source} is {kind}, not text; {remedy}")
    return decoded(name, data, source)


def _may_be_text(data: bytes) -> bool:
    """Whether `data` could be a text that only begins like a file of another kind."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\x00" not in data


def _wide_encoding(data: bytes) -> str | None:
    """The encoding of several bytes per character that `data` is in, by its mark or its zeros."""
    for mark, encoding in UTF32 + UTF16:
        if data.startswith(mark):
            return encoding
    sample = data[:4096]
    even, odd = (part.count(0) / max(1, len(part)) for part in (sample[::2], sample[1::2]))
    if len(sample) >= 8 and min(even, odd) < 0.05 and max(even, odd) > 0.4:
        return "utf-16le" if odd > even else "utf-16be"
    return None


def printable(text: str) -> str:
    """`text` with escape sequences and other controls shown, as in `\\x1b[31m`, not sent."""
    return CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def encodable(text: str, encoding: str | None) -> str:
    """`text` with what `encoding` cannot hold written as escapes, as in `\\u6587`."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")
    except LookupError:
        return text.encode("ascii", "backslashreplace").decode("ascii")
    return text
