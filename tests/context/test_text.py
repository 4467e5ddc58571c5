"""Text from anywhere: what can be encoded, what bytes are, what a terminal may be sent."""

import os

import pytest
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.context.text import check_text, encodable, printable, text_of_argument, text_of_file
from squeezed.errors import SqueezedError

ANY_SCRIPT = "naïve Ünïcode, 文書。 한국어! سؤال؟ हिन्दी। 👩‍👩‍👧 \x00\t\r\n\ufffd\ue000\U0010ffff"


def test_text_of_any_script_is_taken_as_it_is():
    assert check_text("text", ANY_SCRIPT) == ANY_SCRIPT
    assert text_of_file("document", ANY_SCRIPT.encode(), "it") == ANY_SCRIPT


@pytest.mark.parametrize("half", ["\ud83d", "\udc00", "\udce9", "\ud83d\ude00"])
def test_half_of_a_surrogate_pair_is_refused_with_its_place(half):
    with pytest.raises(SqueezedError, match=r"question: character 3 \(line 2\).*U\+D"):
        check_text("question", f"a\nb{half}")
    with pytest.raises(SqueezedError, match="text: character 700 "):
        squeezed.index(tiny_model("llama"), tiny_tokenizer(), document(700) + half)


def test_the_remedy_for_surrogate_pairs_mends_them():
    mended = "\ud83d\ude00 \ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert check_text("text", mended) == "😀 \ufffd"


def test_argument_that_the_locale_could_not_read_is_read_as_utf8():
    assert text_of_argument("question", "caf\udcc3\udca9?") == "café?"
    with pytest.raises(SqueezedError, match="byte 3 is 0xE9"):
        text_of_argument("question", os.fsdecode(b"caf\xe9?"))
    with pytest.raises(SqueezedError, match="surrogate"):
        text_of_argument("question", "caf\ud83d?")


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        ("caf\u00e9".encode("latin1"), "iconv -f latin1"),
        ("alpha beta".encode("utf-16"), "iconv -f utf-16 "),
        ("alpha beta".encode("utf-16-le"), "iconv -f utf-16le "),
        ("alpha beta".encode("utf-16-be"), "iconv -f utf-16be "),
        ("alpha beta".encode("utf-32"), "iconv -f utf-32 "),
        (b"%PDF-1.4 plain ASCII", "pdftotext"),
        (b"\x1f\x8b\x08\x00", "gunzip"),
        (b"PK\x03\x04\x14\x00", "extract its text"),
        (b"\x89PNG\r\n", "name a text file"),
    ],
)
def test_file_that_is_no_utf8_text_is_told_apart(data, advice):
    with pytest.raises(SqueezedError, match=advice):
        text_of_file("document", data, "manual")


@pytest.mark.parametrize("text", ["GGUF is a format.", "BZh", "PK, said he", "a\x00b", ""])
def test_text_that_only_begins_like_another_file_is_text(text):
    assert text_of_file("document", text.encode(), "manual") == text


def test_printable_shows_controls_and_leaves_text():
    assert printable("\x1b[31mred\x9b0m\x07\x7f\r") == "\\x1b[31mred\\x9b0m\\x07\\x7f\\x0d"
    assert printable("文書\t\nnaïve") == "文書\t\nnaïve"


def test_encodable_escapes_only_what_the_stream_cannot_hold():
    assert encodable("é文", "latin-1") == "é\\u6587"
    assert encodable("é文", "utf-8") == "é文"
