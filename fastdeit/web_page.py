"""Self-contained HTML pages: no script, no font and no image from elsewhere."""

import base64
from collections.abc import Sequence
from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #d9e2ec; text-align: right; }
th:first-child, td:first-child { text-align: left; }
table.text th, table.text td { text-align: left; }
tr.good td { background: #eef8f1; }
img { max-width: 100%; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.8rem; }
.tiles figure { margin: 0; width: 8rem; }
.tiles img { width: 8rem; height: 8rem; object-fit: contain; image-rendering: pixelated; background: #f5f7fa; }
figcaption { font-size: 12px; }
pre { background: #f5f7fa; padding: 0.8rem; overflow-x: auto; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document with title as heading; parts are HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False, good: Sequence[bool] | None = None
) -> str:
    """A table of plain text.

    Args:
        header, rows: the cells; they are escaped.
        text: align cells to the left, as words are; by default all but the first column to the right, as numbers are.
        good: rows to shade, one flag a row.
    """
    marks = good if good is not None else [False] * len(rows)
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    for row, mark in zip(rows, marks, strict=True):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="good">{cells}</tr>' if mark else f"<tr>{cells}</tr>")
    opening = '<table class="text">' if text else "<table>"
    return "\n".join([opening, *lines, "</table>"])


def picture(png: bytes, alt: str) -> str:
    """An image inside the page."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def tiles(pictures: Sequence[tuple[bytes, str]]) -> str:
    """Small PNG images in a row, each with a caption below."""
    figures = (
        f"<figure>{picture(png, text)}<figcaption>{escape(text)}</figcaption></figure>" for png, text in pictures
    )
    return f'<div class="tiles">{"".join(figures)}</div>'
