"""PDFs written by hand, object by object."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

FONT = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>"


def file_of(objects: Sequence[bytes], trailer: bytes = b"") -> bytes:
    """A file of the objects 1, 2, ..., of which the first is the catalogue."""
    data, places = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    begin = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    data += b"".join(b"%010d 00000 n \n" % place for place in places)
    return data + b"trailer\n<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, trailer, begin)


def stream(body: bytes, head: bytes = b"") -> bytes:
    return b"<<%s/Length %d>>stream\n%s\nendstream" % (head, len(body), body)


def a_pdf(*texts: str, size: tuple[float, float] = (300, 300), trailer: bytes = b"", page: bytes = b"") -> bytes:
    """A page (width, height in points) for each text, of one line for each of the text's; page: more of each."""
    count = len(texts)
    kids = b" ".join(b"%d 0 R" % (4 + 2 * number) for number in range(count))
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, count), FONT]
    for number, text in enumerate(texts):
        box = b"/MediaBox[0 0 %f %f]" % size
        objects.append(
            b"<</Type/Page/Parent 2 0 R%s/Resources<</Font<</F1 3 0 R>>>>/Contents %d 0 R%s>>"
            % (box, 5 + 2 * number, page)
        )
        lines = [line.encode("cp1252").replace(b"(", b"\\(").replace(b")", b"\\)") for line in text.split("\n")]
        shown = b"".join(b"(%s) Tj T* " % line for line in lines)
        objects.append(stream(b"BT /F1 12 Tf 14 TL 20 200 Td %sET" % shown if text else b""))
    return file_of(objects, trailer)


def drawing(content: bytes, size: tuple[float, float] = (100, 100), page: bytes = b"") -> bytes:
    """One page of anything, without text."""
    head = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 %f %f]/Contents 4 0 R%s>>" % (*size, page)
    return file_of([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>", head, stream(content)])


def a_scan(*pictures: Image.Image) -> bytes:
    """A page for each picture, and no text."""
    file = io.BytesIO()
    pictures[0].save(file, "PDF", save_all=True, append_images=pictures[1:])
    return file.getvalue()


def locked() -> bytes:
    """One that asks for a password."""
    secret = b"<%s>" % (b"5a" * 32)
    how = b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O %s/U %s>>/ID[<00><00>]" % (secret, secret)
    return a_pdf("secret", trailer=how)


def a_form(value: str) -> bytes:
    """A page with one text field that was filled in."""
    look = stream(b"BT /F1 12 Tf 2 4 Td (%s) Tj ET" % value.encode(), b"/Type/XObject/Subtype/Form/BBox[0 0 200 20]"
                  b"/Resources<</Font<</F1 5 0 R>>>>")  # fmt: skip
    field = b"<</Type/Annot/Subtype/Widget/FT/Tx/T(name)/V(%s)/Rect[20 100 220 120]/F 4/P 3 0 R/AP<</N 6 0 R>>>>"
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 300]/Resources<</Font<</F1 5 0 R>>>>"
    return file_of([
        b"<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[7 0 R]>>>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        page + b"/Contents 4 0 R/Annots[7 0 R]>>",
        stream(b"BT /F1 12 Tf 20 200 Td (Your name:) Tj ET"), FONT, look, field % value.encode(),
    ])  # fmt: skip
