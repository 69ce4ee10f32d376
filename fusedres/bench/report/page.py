"""A document of headings, text, tables and figures, which becomes Markdown or one HTML page.

Both are made from the same blocks, so that neither can say what the other does not. The page needs
nothing beside itself: no script, no font, no picture from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape


@dataclass(frozen=True)
class Cell:
    """Text, and how it stands out: "best", "wrong", or "" for not at all."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """Its name, the name over it and its neighbours, whether it is read from the right, and
    whether its text may take several lines.
    """

    name: str
    group: str = ""
    number: bool = True
    long: bool = False


@dataclass(frozen=True)
class Heading:
    """Level 2 for a device, 3 for a part, 4 and 5 for what the contents leave out."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """Its first column names the row. `name` is for those who cannot see it."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def pruned(self) -> Table:
        """Without columns that are empty from top to bottom, the first one aside."""
        kept = [i for i in range(len(self.columns)) if not i or any(r[i].text for r in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.name, [self.columns[i] for i in kept], rows)


@dataclass(frozen=True)
class Figure:
    """Drawn only for the page, as drawing takes matplotlib; `draw` is given its number."""

    caption: str
    draw: Callable[[int], str]


Block = Heading | Paragraph | Bullets | Table | Figure
LONG = 60  # rows, from which a table of the page is folded
DASH = "\N{EN DASH}"


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks without the figures."""
    parts = [_markdown(block) for block in blocks if not isinstance(block, Figure)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return "#" * level + " " + _literal(text)
        case Paragraph(text):
            return _literal(text)
        case Bullets(items):
            return "\n".join(f"- {_emphasised(item)}" for item in items)
        case Table():
            names = [f"{c.group}: {c.name}" if c.group else c.name for c in block.columns]
            lines = [[_literal(name) for name in names]]
            lines.append(["---:" if column.number else "---" for column in block.columns])
            lines += [[_emphasised(cell) for cell in row] for row in block.rows]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    raise AssertionError(block)


def _literal(text: str) -> str:
    """Text that Markdown shows as it is, on one line, also inside a table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|*`\[\]])", r"\\\1", text)


def _emphasised(cell: Cell) -> str:
    return f"**{_literal(cell.text)}**" if cell.mark and cell.text else _literal(cell.text)


@dataclass
class _Html:
    """The page as it grows: what is written, which ids are taken, what the contents list."""

    body: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    contents: list[tuple[int, str, str]] = field(default_factory=list)
    figures: int = 0

    def add(self, block: Block) -> None:
        match block:
            case Heading(level, text):
                self._heading(level, text)
            case Paragraph(text):
                self.body.append(f"<p>{escape(text)}</p>")
            case Bullets(items):
                listed = "\n".join(f"<li>{_marked(item)}</li>" for item in items)
                self.body.append(f"<ul>\n{listed}\n</ul>")
            case Table():
                self.body.append(_table(block))
            case Figure(caption, draw):
                self.figures += 1
                self.body.append(
                    f'<figure><div class="scroll" tabindex="0" role="img"'
                    f' aria-label="{escape(caption)}">\n{draw(self.figures)}\n</div>'
                    f"<figcaption>{escape(caption)}</figcaption></figure>"
                )

    def _heading(self, level: int, text: str) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
        name, number = slug, 1
        while name in self.taken:
            number += 1
            name = f"{slug}-{number}"
        self.taken.add(name)
        if level < 4:
            self.contents.append((level, text, name))
        self.body.append(f'<h{level} id="{name}">{escape(text)}</h{level}>')

    def listed(self) -> str:
        """The contents: level 3 within level 2."""
        lines: list[str] = []
        for level, text, name in self.contents:
            link = f'<a href="#{name}">{escape(text)}</a>'
            lines.append(f"<li class=l{level}>{link}</li>")
        return "<ul>\n" + "\n".join(lines) + "\n</ul>"


def html(title: str, blocks: Sequence[Block]) -> str:
    """The whole page; the blocks before the first heading stand above the contents."""
    first = next((i for i, b in enumerate(blocks) if isinstance(b, Heading)), len(blocks))
    lead, rest = _Html(), _Html()
    for block in blocks[:first]:
        lead.add(block)
    for block in blocks[first:]:
        rest.add(block)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{chr(10).join(lead.body)}
<nav aria-label="Contents">
{rest.listed()}
</nav>
<main>
{chr(10).join(rest.body)}
</main>
</body>
</html>
"""


def _marked(cell: Cell) -> str:
    text = escape(cell.text)
    return f'<strong class="{escape(cell.mark)}">{text}</strong>' if cell.mark else text


def _table(table: Table) -> str:
    rows = "\n".join(_row(table.columns, row) for row in table.rows)
    content = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.name)}">'
        f"<table>\n<thead>\n{_heads(table.columns)}\n</thead>\n<tbody>\n{rows}\n</tbody>\n"
        "</table></div>"
    )
    if len(table.rows) < LONG:
        return content
    summary = f"{escape(table.name)}: table of {len(table.rows)} rows"
    return f"<details><summary>{summary}</summary>\n{content}\n</details>"


def _heads(columns: Sequence[Column]) -> str:
    """One line of column heads, or two where columns stand in groups."""
    names, over = [], []
    grouped = any(column.group for column in columns)
    for i, column in enumerate(columns):
        starts = not i or columns[i - 1].group != column.group
        kind = _class(column, starts and bool(column.group))
        if grouped and not column.group:
            over.append(f'<th scope="col" rowspan="2"{kind}>{escape(column.name)}</th>')
            continue
        names.append(f'<th scope="col"{kind}>{escape(column.name)}</th>')
        if grouped and starts:
            span = sum(other.group == column.group for other in columns)
            over.append(
                f'<th scope="colgroup" colspan="{span}" class="over">{escape(column.group)}</th>'
            )
    lines = [over, names] if grouped else [names]
    return "\n".join(f"<tr>{''.join(line)}</tr>" for line in lines)


def _row(columns: Sequence[Column], cells: Sequence[Cell]) -> str:
    parts = []
    for i, (column, cell) in enumerate(zip(columns, cells, strict=True)):
        starts = bool(column.group) and columns[i - 1].group != column.group
        tag = "td" if i else "th"
        scope = "" if i else ' scope="row"'
        parts.append(f"<{tag}{scope}{_class(column, starts)}>{_marked(cell)}</{tag}>")
    return f"<tr>{''.join(parts)}</tr>"


def _class(column: Column, starts: bool) -> str:
    kinds = [
        kind
        for kind, applies in (
            ("n", column.number),
            ("start", starts),
            ("long", column.long),
        )
        if applies
    ]
    return f' class="{" ".join(kinds)}"' if kinds else ""


STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1d21; --soft: #555a62; --line: #d4d7dc;
  --band: #f3f5f8; --wrong: #b3001b; --link: #0a57a8; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --ink: #e7e8ea; --soft: #abb0b8;
  --line: #3b4049; --band: #1f232a; --wrong: #ff9187; --link: #8fbcff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.25rem 4rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.5rem; margin: 3rem 0 1rem; padding-top: .75rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
h5 { font-size: .9375rem; font-weight: 600; margin: 1.25rem 0 .25rem; }
p, ul { max-width: 48rem; overflow-wrap: anywhere; }
li { margin: .25rem 0; }
a { color: var(--link); }
nav { background: var(--band); border-radius: 8px; padding: .25rem 1rem; margin: 1.5rem 0; }
nav ul { list-style: none; padding: 0; margin: .5rem 0; }
nav .l2 { font-weight: 600; margin-top: .6rem; }
nav .l3 { display: inline-block; margin: .1rem 1rem .1rem 0; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem;
  font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
tr > th:first-child { position: sticky; left: 0; background: var(--back); padding-left: 0; }
tbody tr:hover > * { background: var(--band); }
.n { text-align: right; }
.over { text-align: center; }
.start, .over { border-left: 1px solid var(--line); }
.long { white-space: normal; min-width: min(15rem, 50vw); max-width: 36rem;
  overflow-wrap: anywhere; }
.wrong { color: var(--wrong); }
.best { font-weight: 700; }
figure { margin: .75rem 0 1.25rem; }
figure .scroll { background: #fff; border-radius: 8px; max-width: 40rem; padding: .25rem;
  border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: .875rem; max-width: 40rem; margin-top: .3rem; }
svg { display: block; width: 100%; min-width: 20rem; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, sans-serif !important; }
summary { cursor: pointer; color: var(--link); }
@media print { .scroll { overflow: visible; } nav { display: none; } }
"""
