"""Bars as SVG: a panel per comparison, a bar per system, longer is better."""
import html

PANEL_WIDTH, LABEL_WIDTH, VALUE_WIDTH, BAR, GAP, HEADING, MARGIN = 470, 180, 70, 16, 6, 34, 20
LEAST_WIDTH = 760  # room for title and note
OURS, OTHERS, TEXT, FAINT = "#b2182b", "#8da0b3", "#222222", "#777777"


def text(x, y, words, size=12, colour=TEXT, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" {more}>{html.escape(words)}</text>'


def bars(left, top, heading, values, most):
    """A panel: `values` are (name, number or None, whether it is ours); a bar of `most` fills it."""
    most = most or max((number for _, number, _ in values if number), default=1)
    room = PANEL_WIDTH - LABEL_WIDTH - VALUE_WIDTH
    parts = [text(left, top + 16, heading, 13, more='font-weight="bold"')]
    for index, (name, number, is_ours) in enumerate(values):
        y = top + HEADING + index * (BAR + GAP)
        middle = y + BAR - 4
        parts.append(text(left + LABEL_WIDTH - 8, middle, name, more='text-anchor="end"'))
        if number is None:
            parts.append(text(left + LABEL_WIDTH, middle, "not run", 11, FAINT))
            continue
        width = max(1, room * number / most)
        colour = OURS if is_ours else OTHERS
        parts.append(f'<rect x="{left + LABEL_WIDTH}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
        parts.append(text(left + LABEL_WIDTH + width + 6, middle, f"{number:,.3g}" if number < 100 else f"{number:,.0f}"))
    return parts


def chart(title, note, rows, most=None):
    """An SVG of rows of panels; a panel is (heading, values). All have one scale up to `most`, or each its own."""
    heights = [HEADING + max(len(values) for _, values in row) * (BAR + GAP) + MARGIN for row in rows]
    width = max(LEAST_WIDTH, MARGIN + max(map(len, rows)) * (PANEL_WIDTH + MARGIN))
    height = 70 + sum(heights)
    parts = [text(MARGIN, 30, title, 17, more='font-weight="bold"'), text(MARGIN, 50, note, 12, FAINT)]
    top = 70
    for row, row_height in zip(rows, heights):
        for column, (heading, values) in enumerate(row):
            parts += bars(MARGIN + column * (PANEL_WIDTH + MARGIN), top, heading, values, most)
        top += row_height
    size = f'width="{width}" height="{height}"'
    begin = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" font-family="sans-serif">'
    return "\n".join([begin, f'<rect {size} fill="white"/>', *parts, "</svg>"]) + "\n"
