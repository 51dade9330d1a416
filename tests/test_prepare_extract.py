"""Promises of the step that turns bytes into text, and of the formats it reads."""

# ruff: noqa: E402, RUF001  (libraries that may be missing come first; letters of many scripts are the subject)

import codecs
import gzip
import io
import os
import re
import types
import zlib
from email.header import Header
from email.message import EmailMessage
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow")
pytest.importorskip("resiliparse")
pytest.importorskip("pypdfium2")
brotli = pytest.importorskip("brotli")
zstandard = pytest.importorskip("zstandard")
pytest.importorskip("fastwarc")

from llmjax.prepare.documents import make_batch
from llmjax.prepare.formats import RejectedError, charsets, extraction, html, isolated, mail, pdf, warc
from llmjax.prepare.steps import extract

FIXTURES = Path(__file__).parent / "fixtures"
SWEDISH = "Det var en gång en gammal älg som åt äpplen i trädgården, och över ängen flög en tärna mot sjön. " * 4
RUSSIAN = "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью. " * 3


def options(**changes):
    defaults = {"html": "main", "pdf_margins": True, "encodings": ("utf-8", "detect"), "max_document_bytes": 256_000_000,
                "max_document_seconds": 60.0}  # fmt: skip
    return types.SimpleNamespace(**{**defaults, **changes})


def run(*documents, **changes):
    """Rows (text, reason, facts) of (format, bytes) pairs."""
    rows = [{"format": name, "data": data, "path": str(i)} for i, (name, data) in enumerate(documents)]
    batch = extract.make(options(**changes))(make_batch(rows))
    return list(zip(*(batch[name].to_pylist() for name in ("text", "reason", "facts")), strict=True))


def make_pdf(pages, *, raw=None):
    """A small PDF of one column of lines per page; `raw`: bytes of a compressed stream in place of the first page's."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for number, lines in enumerate(pages):
        shown = b" T* ".join(b"(%s) Tj" % line.encode().replace(b"(", rb"\(").replace(b")", rb"\)") for line in lines)
        content = zlib.compress(b"BT /F1 12 Tf 14 TL 50 780 Td %s ET" % shown)
        content = raw if raw is not None and number == 0 else content
        objects.append(b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(content), content))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), b" ".join(kids))
    return pdf_of(objects)


def nested_forms(depth):
    """A PDF whose page shows a form that shows the next form twice, and so on."""
    resources = b"/Resources << /XObject << /F %d 0 R >> >>"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R %s >>" % (resources % 5),
        b"<< /Length 5 >>\nstream\n/F Do\nendstream",
    ]
    for number in range(5, 5 + depth):
        head = b"/Type /XObject /Subtype /Form /BBox [0 0 600 800] /Length 11 " + resources % (number + 1)
        objects.append(b"<< %s >>\nstream\n/F Do /F Do\nendstream" % head)
    return pdf_of([*objects, b"<< /Type /XObject /Subtype /Form /BBox [0 0 1 1] /Length 0 >>\nstream\n\nendstream"])


def pdf_of(objects):
    """The file of the bodies of its objects, the first of them the catalogue."""
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return out + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
        % (size, table, size, len(out))
    )


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("utf-8", SWEDISH), ("utf-8-sig", SWEDISH), ("utf-16", SWEDISH), ("utf-32", SWEDISH), ("utf-16-le", SWEDISH),
     ("utf-16-be", SWEDISH), ("cp1252", SWEDISH), ("cp850", SWEDISH), ("mac_roman", SWEDISH), ("koi8-r", RUSSIAN),
     ("cp1251", RUSSIAN)],
)  # fmt: skip
def test_text_of_any_usual_encoding_is_read(encoding, text):
    [(found, reason, facts)] = run(("text", text.encode(encoding)))
    assert (found, reason) == (text, "")
    assert bool(facts) == (encoding in ("utf-16-le", "utf-16-be", "cp1252", "cp850", "mac_roman", "koi8-r", "cp1251"))


def test_the_encodings_given_are_tried_in_their_order():
    data = "smörgås".encode("cp850")
    assert run(("text", data), encodings=("utf-8", "cp850"))[0][0] == "smörgås"
    assert run(("text", data), encodings=("utf-8", "latin-1"))[0][0] != "smörgås"


def test_what_is_not_text_is_a_reject_with_its_reason():
    noise = bytes((i * i * 31 + i // 7 * 13) % 256 for i in range(5000))
    rows = run(("text", b"\x7fELF\x02\x01\x01" + b"\0" * 64), ("text", noise), ("text", b""), ("text", b" \n"),
               ("text", b"\x01\x02\x03\x04abc" * 50), ("text", b"PK\x03\x04rest of an archive"), ("odt", b"abc"),
               ("text", b"ab\xff\xfe\x81\x8d" * 3), ("html", b"<p></p>"))  # fmt: skip
    assert [reason.partition(":")[0] for _, reason, _ in rows[:7]] == ["binary", "binary", "empty", "empty", "binary", "binary",
                                                     "format"]  # fmt: skip
    assert all(text is None for text, _, _ in rows[:7])
    assert rows[8][1] == "html: no text"


def test_bytes_that_no_encoding_explains_are_the_wrong_encoding(monkeypatch):
    monkeypatch.setattr("llmjax.prepare.formats.text._guesses", lambda data, *, markup: ["ascii", "no-such-codec"])
    text, reason, _ = run(("text", b"caf\xe9 cr\xe8me"))[0]
    assert text is None and reason == "wrong encoding: neither utf-8 nor any that is known"


def test_without_detection_bytes_are_what_they_are_said_to_be_or_rejected():
    assert run(("text", b"caf\xe9"), encodings=("utf-8",))[0][:2] == (None, "invalid UTF-8: at byte 3")
    assert run(("text", b"caf\xe9"), encodings=("utf-8", "ascii"))[0][1] == "wrong encoding: neither utf-8, ascii"
    page = "<html><head><meta charset=latin-1></head><body><p>caf\xe9 au lait</p></body></html>".encode("latin-1")
    assert "caf\xe9" in run(("html", page), encodings=("utf-8",))[0][0]  # it says so itself


def test_a_declared_charset_goes_before_utf8_that_few_characters_confirm_and_not_before_sure_utf8():
    assert run(("text; charset=gbk", "联通".encode("gbk")))[0][0] == "联通"  # also two characters of UTF-8
    assert run(("text; charset=iso-8859-1", "naïve".encode()))[0][0] == "naïve"  # says latin-1, is UTF-8
    assert run(("text; charset=shift_jis", RUSSIAN.encode()))[0][0] == RUSSIAN
    assert run(("text; charset=iso-8859-1", b"\x93quoted\x94"))[0][0] == "“quoted”"  # what the web calls latin-1
    assert run(("text; charset=no-such-thing", b"plain"))[0][0] == "plain"
    japanese = "これは日本語です。"
    declared = f"<html><meta charset=iso-2022-jp><body><p>{japanese * 9}</p>".encode("iso-2022-jp")
    assert run(("html", declared))[0][0] == japanese * 9
    assert run(("text", japanese.encode("iso-2022-jp")))[0][0] == japanese  # detected by its escapes


def test_every_label_of_the_web_names_its_encoding():
    for line in (FIXTURES / "charset_labels.txt").read_text().splitlines()[1:]:
        name, _, labels = line.partition(" = ")
        assert {codecs.lookup(charsets.codec_of(label.upper())).name for label in labels.split()} == {
            codecs.lookup(name).name
        }
    for label in ("no-such", "rot13", "idna", "unicode_escape", "cp037", "utf\0", ""):  # cp037 is no ASCII
        assert charsets.codec_of(label) == ""


KOREAN, CHINESE = (
    "밤사이 강물이 불어나 마을 사람들은 의자를 학교 위층으로 옮겼다. ",
    "夜里河水上涨镇上的人们把椅子搬到学校的楼上",
)


@pytest.mark.parametrize(
    ("media", "data", "text"),
    [
        ("text; charset=csiso2022kr", KOREAN.encode("iso2022_kr"), KOREAN),
        ("text; charset=windows-949", KOREAN.encode("cp949"), KOREAN),
        ("text; charset=win-1251", RUSSIAN.encode("cp1251"), RUSSIAN),
        ("text; charset=utf-16", CHINESE.encode("utf-16-le") + b" \0", CHINESE + " "),  # few NULs on one side
        ("text; charset=utf-16", SWEDISH.encode(), SWEDISH),  # no NUL, so it is not in UTF-16
        ("text; charset=gbk", (CHINESE * 20).encode("gbk") + b"\xff", CHINESE * 20 + "\ufffd"),
        ("text", SWEDISH.encode("utf-16")[:-1], SWEDISH[:-1] + "\ufffd"),  # cut within a character
        ("html", f"<meta charset=utf-16><body><p>{SWEDISH}</p>".encode(), SWEDISH.strip()),
        ("html", f"<!-- <meta charset=gbk> --><meta charset=shift_jis><p>{'川は増水した' * 9}</p>".encode("cp932"), "川は増水した" * 9),
    ],
)  # fmt: skip
def test_declared_encodings_of_every_kind_are_believed_as_far_as_the_bytes_allow(media, data, text):
    [(found, reason, _)] = run((media, data), encodings=("utf-8",))
    assert (found, reason) == (text, "")


@pytest.mark.parametrize("text", [SWEDISH, RUSSIAN, "川は夜のうちに増水した。" * 20])
@pytest.mark.parametrize("encodings", [("utf-8",), ("utf-8", "detect")])
def test_a_bad_byte_is_counted_and_costs_a_character_not_the_document(text, encodings):
    whole = text.encode()
    at = len(text[: len(text) // 2].encode())
    rows = run(("text", whole[:at] + b"\xff" + whole[at:]), ("text", whole + "é".encode()[:1]), encodings=encodings)
    assert [row[0].replace("\ufffd", "") for row in rows] == [text, text]
    assert [row[2] for row in rows] == ['{"extract.bad_bytes": 1}'] * 2


def test_a_few_bad_bytes_in_much_ascii_are_counted_too():
    data = b"A line of plain words. " * 100 + b"caf\xe9 "
    assert run(("text", data), encodings=("utf-8",))[0][2] == '{"extract.bad_bytes": 1}'
    assert "café" in run(("text", data))[0][0]  # a guess that explains every byte goes before


def test_line_ends_become_newlines():
    assert run(("text", "a\r\nb\rc\u2028d\n".encode()))[0][0] == "a\nb\nc\u2028d\n"


def test_unknown_settings_say_how_to_mend_them():
    with pytest.raises(ValueError, match="main, all, raw"):
        extract.make(options(html="most"))
    with pytest.raises(ValueError, match="no encoding 'utf-9'"):
        extract.make(options(encodings=("utf-9",)))


def test_rejected_rows_and_rows_with_text_are_untouched():
    batch = make_batch([{"format": "text", "data": b"abc", "reason": "language: de"}, {"text": "kept"}])
    assert extract.make(options())(batch).equals(batch)


def test_data_and_format_are_empty_after_extraction_and_kept_for_rejects():
    batch = extract.make(options())(make_batch([{"format": "text", "data": b"abc"}, {"format": "pdf", "data": b"abc"}]))
    assert batch["data"].to_pylist() == [None, b"abc"]
    assert batch["format"].to_pylist() == ["", "pdf"]
    assert batch["reason"].to_pylist()[1].startswith("pdf: broken")


DOCUMENTS = [("text", SWEDISH.encode("cp1252")), ("text", b"plain"), ("text", b"\0\0\0"), ("html", b"<p>a page of text</p>"),
             ("pdf", make_pdf([["one line"]])), ("pdf", b"no pdf"), ("mail", b"Subject: hello\n\nbody\n")]  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(DOCUMENTS), max_size=6), st.integers(1, 4))
def test_batches_do_not_change_the_result(documents, size):
    whole = run(*documents)
    assert whole == [row for at in range(0, len(documents), size) for row in run(*documents[at : at + size])]


# HTML

INTRO = "<p>Some introduction of the page, in a paragraph of words that is long enough to be the main content.</p>"


def page(body):
    return (
        "<html><head><title>t</title><style>p{}</style></head><body><header>Site name</header>"
        f"<nav><ul><li><a href='/'>Home</a></li><li><a href='/b'>Blog</a></li></ul></nav><main>{INTRO}{body}</main>"
        "<footer>Copyright of nobody</footer><script>var x = 1;</script></body></html>"
    )


def main(body):
    return html.extract(page(body))[0]


def test_navigation_and_footer_are_left_out_of_the_main_content_only():
    text = main("")
    assert text == INTRO[3:-4]
    everything = html.extract(page(""), "all")[0]
    assert "Home" in everything and "Copyright" in everything and "var x" not in everything
    assert html.extract(page(""), "raw")[0] == page("")


def test_code_keeps_its_line_ends_and_indentation():
    code = "def f(x):\n    if x:\n\t\treturn 1\t\t# tabs\n\n\n    return   x[0]"
    escaped = code.replace("x[0]", "x <b>[0]</b>").replace("x <b>", "x<b>")
    table = "<table><tr><td>a</td><td>b</td></tr></table>"
    assert code in main(f"<pre><code>{escaped}</code></pre>")
    assert code in main(f"<pre>{code}</pre>{table}")
    assert "a = 1\nb = 2" in main("<div class=highlight><pre>a = 1<br>b = 2</pre></div>" + table)


def test_line_numbers_beside_code_are_dropped():
    body = "<table><tr><td class='linenos'><pre>1\n2</pre></td><td class='code'><pre>a = 1\n  b</pre></td></tr></table>"
    assert main(body).removeprefix(INTRO[3:-4]).strip("\n") == "a = 1\n  b"


def test_rows_of_tables_stay_lines_and_cells_have_borders():
    body = "<table><tr><th>name</th><th></th><th>n</th></tr><tr><td>a<br>b</td><td><p>x</p><p>y</p></td><td>3</td></tr></table>"
    assert main(body).endswith("name |  | n\na b | x y | 3")


def test_lists_of_text_are_content_and_lists_of_links_are_not():
    text = main("<ul><li>The first item is a sentence.</li><li>So is the second, <a href='x'>linked</a>.</li></ul>")
    assert "The first item is a sentence." in text and "So is the second, linked." in text
    assert "Archive" not in main("<ul><li><a href='a'>Archive of the year</a></li><li><a href='b'>Older</a></li></ul>")


def test_a_page_without_main_content_keeps_its_text_and_is_counted():
    links = "".join(f"<li><a href='/{i}'>Entry number {i} of the list of the whole site</a></li>" for i in range(20))
    [(text, reason, facts)] = run(("html", f"<html><body><ul>{links}</ul></body></html>".encode()))
    assert reason == "" and "Entry number 7" in text and facts == '{"extract.fallback": 1}'


def test_a_page_is_read_by_the_encoding_that_it_declares():
    body = f"<html><head><meta charset='windows-1251'></head><body><p>{RUSSIAN}</p></body></html>"
    assert run(("html", body.encode("cp1251")))[0][0] == RUSSIAN.strip()


def test_a_page_nested_too_deeply_is_taken_whole():
    [(text, _, facts)] = run(("html", b"<div>" * 50_000 + b"text of a page" + b"</div>" * 50_000))
    assert text == "text of a page" and "fallback" in facts
    many = "<p>a paragraph that is not closed<br>" * 5_000  # many tags, and not deep
    [(text, _, facts)] = run(("html", page(many).encode()))
    assert text.count("not closed") == 5_000 and not facts


@pytest.mark.parametrize(
    "bad",
    [b"<table><tr><td><p>" + b"<" * 300_000, b"<table>" + b"<td " * 300_000, b"<header>a " * 100_000,
     b"<ul><li>" + b"text " * 9 + b"<a " * 300_000 + b"</ul>", b"<table>\t\t" + b"<pre " * 300_000, b"</ul " * 1_000_000],
    ids=["less-than", "cells", "headers", "links", "pre", "lists"],
)  # fmt: skip
def test_patterns_over_pages_take_linear_time(bad):
    """Linear time is well below a second of the 60 that a document may take, quadratic time far beyond."""
    [(_, reason, _)] = run(("html", bad))
    assert not reason.startswith("too slow")


def test_broken_pages_do_not_raise():
    for data in (b"<<<>>><table><tr><td><p>x</table>", b"<table><td><ul><li>", b"</body><pre>a\t\tb<table>"):
        [(text, reason, _)] = run(("html", data))
        assert text or reason


# PDF


def test_headers_footers_and_page_numbers_are_removed():
    body = ["Body of page {} begins.", "It goes on.", "And on.", "Page {} ends here."]
    pages = [["The Great Report", *(line.format("abcdef"[i]) for line in body), f"Page {i + 1} of 6"] for i in range(6)]
    text = pdf.extract(make_pdf(pages))
    assert "Great Report" not in text and "of 6" not in text
    assert all("\n".join(body).format(c, c) in text for c in "abcdef")
    assert "Great Report" in pdf.extract(make_pdf(pages), margins=False)


def test_a_line_that_only_few_pages_have_is_no_margin():
    assert pdf.drop_margins([["Preface", "a"], ["Preface", "b"], ["c"], ["d"]])[0] == ["Preface", "a"]


def test_hyphens_of_line_ends_are_joined_and_those_of_words_kept():
    assert pdf.join_hyphens("the infor-\nmation is here") == "the information is here"
    assert pdf.join_hyphens("a well-known fact, well-\nknown indeed") == "a well-known fact, well-known indeed"
    assert pdf.join_hyphens("from 1990-\n1995, the Anglo-\nSaxon") == "from 1990-1995, the Anglo-Saxon"
    assert pdf.join_hyphens("soft\u00ad\nhyphen") == "softhyphen"
    assert pdf.join_hyphens("- a\n- b\n") == "- a\n- b\n"


def test_a_sentence_runs_on_over_a_page_break():
    assert (
        pdf.join_pages(["It was a long", "and winding road.", "The end."])
        == "It was a long\nand winding road.\n\nThe end."
    )


def test_a_pdf_with_a_password_is_a_reject_and_one_that_anyone_may_open_is_read():
    """Both files are encrypted by AES-256; the second has a password for its owner only."""
    locked, unlocked = (FIXTURES / "locked.pdf").read_bytes(), (FIXTURES / "unlocked.pdf").read_bytes()
    [refused, read] = run(("pdf", locked), ("pdf", unlocked))
    assert refused[:2] == (None, "pdf: password") and read[:2] == ("open to all", "")


def test_broken_empty_and_scanned_pdf_are_rejects():
    whole = make_pdf([["some text"]] * 3)
    reasons = [
        row[1] for row in run(("pdf", whole[:400]), ("pdf", b"%PDF-1.4"), ("pdf", make_pdf([[]])), ("pdf", b"\0" * 99))
    ]
    assert all(reason.startswith("pdf: ") for reason in reasons)
    assert reasons[2] == "pdf: no text"


def test_a_document_that_takes_too_long_or_crashes_the_parser_costs_itself():
    """Forms that show the next one twice: 2^40 texts, in C code that no timer of Python's can stop."""
    [slow, _, plain] = run(("pdf", nested_forms(40)), ("pdf", b"no pdf"), ("pdf", make_pdf([["one line"]])),
                           max_document_seconds=0.5)  # fmt: skip
    assert slow[:2] == (None, "too slow: more than prepare.max_document_seconds=0.5") and plain[0] == "one line"
    with pytest.raises(RejectedError, match="ended with SIGABRT"):
        isolated.call(os.abort, seconds=0)
    with pytest.raises(RejectedError, match="too large"):
        isolated.call(bytes, 2 * isolated.MEMORY_BYTES, seconds=0)
    assert isolated.call(len, "abc", seconds=0) == 3
    with pytest.raises(ZeroDivisionError):
        isolated.call(divmod, 1, 0, seconds=0)


def test_a_parser_in_rust_that_gives_up_costs_its_document(monkeypatch):
    class PanicException(BaseException):  # as pyo3's, which no module names
        pass

    def extract_badly(*_):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(extraction.html, "extract", extract_badly)
    assert run(("html", b"<p>x"))[0][1] == "broken: the parser ended with 'index out of bounds'"


def test_ligatures_of_pdf_are_letters():
    content = b"BT /F1 12 Tf 72 700 Td (The of\x01cial e\x02ect of \x03ow, a\x04x, e\x05) Tj ET"
    table = b"".join(b"<%02x> <FB%02x> " % pair for pair in ((1, 1), (2, 0), (3, 2), (4, 3), (5, 4)))
    table = b"1 begincodespacerange <00> <FF> endcodespacerange 5 beginbfchar %s endbfchar " % table
    table += b"1 beginbfrange <20> <7E> <0020> endbfrange"
    for font in (b"/Encoding << /Differences [1 /fi /ff /fl /ffi /ffl] >>", b"/ToUnicode 6 0 R"):
        objects = [
            b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica %s >>" % font,
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(table), table),
        ]  # fmt: skip
        assert run(("pdf", pdf_of(objects)))[0][0] == "The official effect of flow, affix, effl"


def test_a_text_longer_than_a_document_may_be_is_a_reject():
    [row] = run(("html", b"<ul><li>a" * 3_000), max_document_bytes=1_000_000, html="all")
    assert row[:2] == (None, "too large: text of more than prepare.max_document_bytes=1,000,000")


def test_a_pdf_of_too_many_pages_is_a_reject(monkeypatch):
    monkeypatch.setattr(pdf, "PAGES", 2)
    with pytest.raises(RejectedError, match="pdf: more than 2 pages"):
        pdf.extract(make_pdf([["x"]] * 3))


# Mail


def test_mail_gives_subject_and_plain_text_without_attachments():
    message = EmailMessage()
    message["Subject"] = "Grüße und ein sehr langes Thema, das umbrochen werden muss, weil es so lang ist"
    message["From"] = "someone@site.org"
    message.set_content("Schöne Grüße = gut\nZeile zwei\n", cte="quoted-printable", charset="iso-8859-1")
    message.add_alternative("<p>the html</p>", subtype="html")
    message.add_attachment(b"\x89PNG....", maintype="image", subtype="png", filename="a.png")
    text = run(("mail", message.as_bytes()))[0][0]
    assert text == f"{message['Subject']}\n\nSchöne Grüße = gut\nZeile zwei\n"


def test_mail_of_html_only_gives_its_visible_text():
    message = EmailMessage()
    message["Subject"] = "News"
    message.set_content("<html><body><p>Hello <b>you</b></p><script>x()</script></body></html>", subtype="html")
    assert run(("mail", message.as_bytes()))[0][0] == "News\n\nHello you\n"


def test_mail_without_text_is_a_reject():
    message = EmailMessage()
    message["Subject"] = "Picture"
    message.add_attachment(b"\x89PNG....", maintype="image", subtype="png", filename="a.png")
    rows = run(("mail", message.as_bytes()), ("mail", b"Content-Type: multipart/mixed\n\n--"))
    assert all(text is None and reason for text, reason, _ in rows)
    assert rows[0][1] == "mail: no text"


def test_a_header_of_mail_that_takes_the_parser_hours_costs_its_message():
    slow = b"Content-Type: text/plain; " + b"a=b; " * 20_000 + b"\n\nbody"
    rows = run(("mail", slow), ("mail", b"Subject: next\n\nbody"), max_document_seconds=0.5)
    assert [row[:2] for row in rows] == [
        (None, "too slow: more than prepare.max_document_seconds=0.5"), ("next\n\nbody\n", ""),
    ]  # fmt: skip


def test_mail_is_read_by_the_charset_that_it_declares():
    """ISO-2022-JP is seven-bit, so it would be taken for UTF-8; the mail of Japan and older pages are in it."""
    text = "これは日本語の手紙です。元気ですか。"
    for codec in ("iso-2022-jp", "shift_jis", "euc-jp"):
        head = f"Content-Type: text/plain; charset={codec}\nContent-Transfer-Encoding: 8bit\n\n"
        assert run(("mail", head.encode() + text.encode(codec)))[0][:2] == (text + "\n", "")


def test_the_subject_is_read_by_the_charset_that_its_words_declare_or_that_of_the_body():
    text = "これは日本語の手紙です"
    for label, codec in (("cp932", "cp932"), ("x-sjis", "cp932"), ("ISO-2022-JP", "iso2022_jp"), ("utf-8", "utf-8")):
        subject = Header(text, codec).encode().replace(codec, label, 1)
        assert run(("mail", f"Subject: {subject}\n\nbody\n".encode()))[0][0] == f"{text}\n\nbody\n", label
        head = f"Subject: {text}\nContent-Type: text/plain; charset={label}\n\nbody\n".encode(codec)
        assert run(("mail", head))[0][0] == f"{text}\n\nbody\n", label


def test_mail_whose_plain_part_is_empty_gives_that_of_html():
    message = EmailMessage()
    message.set_content(" \n")
    message.add_alternative("<p>the html</p>", subtype="html")
    assert run(("mail", message.as_bytes()))[0][0] == "the html\n"


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["html", "mail", "text", "pdf"]), st.binary(max_size=60), st.integers(0, 2000), st.booleans())
def test_whatever_the_bytes_are_the_parsers_give_text_or_a_reason(kind, noise, at, is_cut):
    message = EmailMessage()
    message["Subject"], message["To"] = "Grüße aus der Stadt", "a@b.org"
    message.set_content("Schöne Grüße\n", cte="quoted-printable")
    message.add_alternative("<p>the html</p>", subtype="html")
    whole = {"html": page("<table><tr><td>a<ul><li>b</ul></table>").encode(), "mail": message.as_bytes(),
             "text": SWEDISH.encode(), "pdf": make_pdf([["one line"]] * 2)}[kind]  # fmt: skip
    data = whole[:at] + noise + (b"" if is_cut else whole[at + len(noise) :])
    [(text, reason, _)] = run((kind, data))
    assert (text is None) == bool(reason)


def test_a_mailbox_is_read_message_by_message_however_large_it_is():
    message = b"From a@b.c Sat Jan  3 01:05:34 1996\nSubject: Hello\nMessage-ID: <%d@b.c>\n\n>From here on\n\n"
    box = message % 1 + message.replace(b"here", b"h" * 200) % 2 + message % 3
    first, large, last = mail.messages(io.BytesIO(box), "box", max_bytes=150)
    assert (
        first["data"] == (message % 1).split(b"\n", 1)[1].replace(b">From", b"From") and first["group"] == "box#<1@b.c>"
    )
    assert large["reason"].startswith("too large") and "data" not in large
    assert (last["path"], last["offset"]) == ("box:3", box.rindex(b"From a@b"))


# WARC


def page_number(number):
    sentences = (f"<p>Page {number} says that the river rose in the night {i}, and so on.</p>" for i in range(9))
    return f"<html><body><article>{''.join(sentences)}</article></body></html>".encode()


def warc_record(number, head, body):
    """A record of WARC: the number of its page, header lines of HTTP, the body."""
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html" + head + b"\r\n\r\n" + body
    return (
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:%032d>\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        b"WARC-Target-URI: http://site%d.org/\r\nContent-Type: application/http; msgtype=response\r\n"
        b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (number, number, len(http), http)
    )


def warc_file(*responses):
    """A WARC file of (header lines, body) pairs of HTTP."""
    return b"".join(gzip.compress(warc_record(number, *response)) for number, response in enumerate(responses))


def read_warc(data, *, max_bytes=1_000_000):
    return list(warc.read(io.BytesIO(data), "a", max_bytes=max_bytes))


def chunked(body):
    pieces = (body[at : at + 300] for at in range(0, len(body), 300))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def raw_deflate(body):
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflater.compress(body) + deflater.flush()


GZIP, CHUNKED = b"\r\nContent-Encoding: gzip", b"\r\nTransfer-Encoding: chunked"
ZSTD = b"\r\nContent-Encoding: zstd"
PAGE = page_number(1)


@pytest.mark.parametrize(
    ("head", "body", "reason"),
    [
        (GZIP, gzip.compress(PAGE), ""),
        (CHUNKED, chunked(PAGE), ""),
        (CHUNKED + GZIP, chunked(gzip.compress(PAGE)), ""),
        (GZIP, gzip.compress(PAGE[:99]) + gzip.compress(PAGE[99:]) + b"\0\0", ""),  # of several members, and padded
        (ZSTD, zstandard.compress(PAGE), ""),
        (ZSTD, zstandard.compress(PAGE[:99]) + zstandard.compress(PAGE[99:]), ""),
        (ZSTD, zstandard.compress(PAGE)[:-9], "broken record: zstd: cut off"),
        (ZSTD, zstandard.compress(bytes(3_000_000)), "too large: more than"),
        (b"\r\nContent-Encoding: deflate", zlib.compress(PAGE), ""),
        (b"\r\nContent-Encoding: deflate", raw_deflate(PAGE), ""),
        (b"\r\nContent-Encoding: br", brotli.compress(PAGE), ""),
        (GZIP, PAGE, ""),  # a crawler that undid the encoding and left the header
        (b"\r\nContent-Encoding: br", PAGE, ""),
        (CHUNKED, PAGE, ""),
        (b"\r\nContent-Encoding: foo", PAGE, ""),
        (GZIP, gzip.compress(PAGE)[:60] + b"x" * 99, "broken record: gzip"),
        (GZIP, gzip.compress(PAGE)[:-9], "broken record: gzip: cut off"),
        (GZIP, gzip.compress(bytes(3_000_000)), "too large: more than"),
        (b"\r\nContent-Encoding: br", b"\xff\x01" * 99, "broken record: br"),
        (CHUNKED, chunked(PAGE)[:-40], "broken record: chunked"),
    ],
)
def test_an_odd_record_of_a_warc_file_costs_itself_and_not_the_file(head, body, reason):
    rows = read_warc(warc_file((b"", page_number(0)), (head, body), (b"", page_number(2))))
    assert [row.get("data") for row in rows] == [page_number(0), None if reason else PAGE, page_number(2)]
    assert rows[1].get("reason", "").startswith(reason) and bool(rows[1].get("reason")) == bool(reason)


def with_length(record, length):
    return re.sub(rb"Content-Length: \d+", b"Content-Length: " + length, record, count=1)


RECORD = warc_record(2, b"", PAGE)
PACKED = gzip.compress(RECORD)


@pytest.mark.parametrize(
    ("odd", "is_packed", "reasons"),
    [
        (with_length(RECORD, b"100"), False, ["broken warc: "]),
        (with_length(RECORD, b"%d" % (len(RECORD) + 400)), False, ["broken warc: "]),  # into the next record
        (with_length(RECORD, b"1000000000000"), False, ["too large"]),  # over all records
        (with_length(RECORD, b"90000"), False, ["broken warc: "]),
        (with_length(RECORD, b"-5"), False, ["broken warc: "]),
        (RECORD.replace(b"Content-Length", b"Content-Size"), False, ["broken warc: "]),
        (RECORD.replace(b"WARC/1.0", b"WRAC/1.0", 1), False, ["broken warc: "]),
        (b"garbage between records\r\n\r\n" * 3, False, ["broken warc: "]),
        (PACKED[:200] + b"x" * 20 + PACKED[220:], True, ["broken warc: "]),
        (PACKED[:-9], True, ["broken warc: "]),
        (PACKED[:-6] + b"\xff\xff" + PACKED[-4:], True, ["broken warc: "]),  # the checksum
        (bytes(50), True, ["broken warc: "]),
        (gzip.compress(b"", mtime=0), True, []),  # its bytes are the test's name, the same in every process
        (RECORD, True, []),  # a record that is not packed among those that are
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_the_records_behind_a_damaged_one_are_read(odd, is_packed, reasons, pack):
    """The odd record is packed as the others are, unless it is packed (or not) already."""
    if is_packed and pack is not gzip.compress:
        pytest.skip("packed by gzip")
    filler = [warc_record(n, b"", page_number(n) * 300) for n in (3, 4)]  # more than max_bytes together
    good = [warc_record(0, b"", page_number(0)), warc_record(1, b"", page_number(1))]
    data = b"".join(map(pack, good)) + (odd if is_packed else pack(odd)) + b"".join(map(pack, filler))
    rows = read_warc(data, max_bytes=300_000)
    pages = [row["url"] for row in rows if not row.get("reason")]
    expected = [0, 1, *([2] if odd is RECORD else []), 3, 4]
    assert pages == [f"http://site{n}.org/" for n in expected]
    found = [row["reason"] for row in rows if row.get("reason")]
    assert [reason[: len(start)] for reason, start in zip(found, reasons, strict=True)] == reasons


def test_what_is_behind_the_last_record_and_no_record_is_told():
    whole = warc_file((b"", PAGE))
    assert [row.get("reason", "")[:12] for row in read_warc(whole + b"garbage")] == ["", "broken warc:"]
    assert [row["reason"][:12] for row in read_warc(b"no record at all")] == ["broken warc:"]
    assert read_warc(b"") == []


def test_a_page_is_read_by_the_charset_of_its_http_header():
    text = "これは日本語のページです。川は夜のうちに増水した。" * 3
    body = f"<html><body><p>{text}</p></body></html>".encode("shift_jis")
    [row] = read_warc(warc_file((b"; charset=Shift_JIS", body)))
    assert row["format"] == "html; charset=Shift_JIS"
    assert run((row["format"], row["data"]), encodings=("utf-8",))[0][:2] == (text, "")
