"""A schedule for people: as text, and as a picture in SVG. Standard library only."""

from dataclasses import dataclass
from html import escape

from lightning_accel.recurrent.graph import RecurrentGraph

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 104, 30, 56, 22, 26


@dataclass(frozen=True)
class Box:
    """A node's place: center, in units of points, and how it is drawn."""

    name: str
    x: float
    y: float
    looped: bool
    kind: str


@dataclass(frozen=True)
class Frame:
    """A stage: left, top, width and height, in points."""

    title: str
    x: float
    y: float
    width: float
    height: float
    looped: bool


@dataclass(frozen=True)
class Picture:
    """What is to be drawn, in points; arrows are (source, target, delay in time steps)."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    frames: tuple[Frame, ...]
    arrows: tuple[tuple[str, str, int], ...]


def schedule_text(graph: RecurrentGraph) -> str:
    """Describe the schedule, one stage a line."""
    lines = []
    for index, stage in enumerate(graph.schedule):
        how = "step by step       " if stage.loop else "all steps at once  "
        after = f"   after {', '.join(str(a + 1) for a in stage.after)}" if stage.after else ""
        lines.append(f"{index + 1:>2}. {how} {' -> '.join(stage.nodes)}{after}")
    delayed = [f"{e.source} -> {e.target} ({e.delay})" for e in graph.edges if e.delay]
    lines.append(f"    delayed by time steps: {', '.join(delayed) if delayed else 'nothing'}")
    return "\n".join(lines)


def lay_out(graph: RecurrentGraph) -> Picture:
    """Place stages from left to right by what they wait for, and a loop's nodes in the order of one step."""
    level: list[int] = []
    for stage in graph.schedule:
        level += [max((level[a] + 1 for a in stage.after), default=0)]
    groups: list[tuple[int, bool, list[str]]] = []
    for depth in range(max(level) + 1):
        loops = [s for s, at in zip(graph.schedule, level, strict=True) if at == depth and s.loop]
        plain = [n for s, at in zip(graph.schedule, level, strict=True) if at == depth and not s.loop for n in s.nodes]
        if plain:
            groups.append((depth, False, plain))
        groups += [(depth, True, list(s.nodes)) for s in loops]
    boxes: list[Box] = []
    frames: list[Frame] = []
    left = float(_MARGIN)
    for _, looped, names in groups:
        columns = _columns(graph, names) if looped else [names]
        tall = max(len(c) for c in columns)
        width = len(columns) * (_WIDTH + _GAP_X) - _GAP_X + 2 * _MARGIN
        height: float = tall * (_HEIGHT + _GAP_Y) + _MARGIN + (48 if looped else 12)
        title = "step by step" if looped else "all steps at once"
        frames.append(Frame(title, left, _MARGIN, width, height, looped))
        for k, column in enumerate(columns):
            offset = (tall - len(column)) * (_HEIGHT + _GAP_Y) / 2
            for row, name in enumerate(column):
                x = left + _MARGIN + k * (_WIDTH + _GAP_X) + _WIDTH / 2
                y = _MARGIN + 34 + offset + row * (_HEIGHT + _GAP_Y) + _HEIGHT / 2
                boxes.append(Box(name, x, y, looped, _kind(graph, name)))
        left += width + _GAP_X
    arrows = tuple((e.source, e.target, e.delay) for e in graph.edges)
    bottom = max(f.y + f.height for f in frames) + 2 * _MARGIN + 30
    return Picture(left - _GAP_X + _MARGIN, bottom, tuple(boxes), tuple(frames), arrows)


def schedule_svg(graph: RecurrentGraph) -> str:
    """Draw the schedule as SVG: frames are stages, dashed red arrows reach the next time steps."""
    picture = lay_out(graph)
    places = {box.name: box for box in picture.boxes}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{picture.width:.0f}" height="{picture.height:.0f}" '
        f'viewBox="0 0 {picture.width:.0f} {picture.height:.0f}" font-family="sans-serif" font-size="12">',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
        '<path d="M0,0 L7,3 L0,6 z" fill="#555"/></marker><marker id="late" markerWidth="8" markerHeight="8" refX="7" '
        'refY="3" orient="auto"><path d="M0,0 L7,3 L0,6 z" fill="#c33"/></marker></defs>',
        f'<rect width="{picture.width:.0f}" height="{picture.height:.0f}" fill="white"/>',
    ]
    for frame in picture.frames:
        fill, line = ("#fdeeea", "#c33") if frame.looped else ("#eaf3fb", "#38c")
        parts.append(
            f'<rect x="{frame.x:.0f}" y="{frame.y:.0f}" width="{frame.width:.0f}" height="{frame.height:.0f}" rx="8" '
            f'fill="{fill}" stroke="{line}"/><text x="{frame.x + 10:.0f}" y="{frame.y + 18:.0f}" fill="{line}">'
            f"{frame.title}</text>"
        )
    for source, target, delay in picture.arrows:
        path, (label_x, label_y) = arrow_path(places[source], places[target], delay)
        style = (
            'stroke="#c33" stroke-dasharray="5 3" marker-end="url(#late)"'
            if delay
            else 'stroke="#555" marker-end="url(#tip)"'
        )
        parts.append(f'<path d="{path}" fill="none" {style}/>')
        if delay:
            parts.append(f'<text x="{label_x:.0f}" y="{label_y:.0f}" fill="#c33" font-size="10">t-{delay}</text>')
    for box in picture.boxes:
        left, top = box.x - _WIDTH / 2, box.y - _HEIGHT / 2
        parts += [
            f'<rect x="{left:.0f}" y="{top:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="5" '
            'fill="white" stroke="#333"/>',
            f'<text x="{box.x:.0f}" y="{box.y - 1:.0f}" text-anchor="middle">{escape(box.name)}</text>',
            f'<text x="{box.x:.0f}" y="{box.y + 11:.0f}" text-anchor="middle" fill="#777" font-size="9">'
            f"{escape(box.kind)}</text>",
        ]
    note = "solid: within a time step; dashed: from an earlier time step"
    parts.append(f'<text x="{_MARGIN}" y="{picture.height - 10:.0f}" fill="#777">{note}</text></svg>')
    return "\n".join(parts)


def arrow_path(source: Box, target: Box, delay: int) -> tuple[str, tuple[float, float]]:
    """Return an arrow as SVG path data, and where its label goes; delayed arrows bend below the boxes."""
    half = _WIDTH / 2
    if not delay and target.x > source.x:
        x0, y0, x1, y1 = source.x + half, source.y, target.x - half, target.y
        bend = (x1 - x0) / 2
        return f"M{x0:.0f},{y0:.0f} C{x0 + bend:.0f},{y0:.0f} {x1 - bend:.0f},{y1:.0f} {x1:.0f},{y1:.0f}", (x0, y0)
    if not delay:
        x0, y0, x1, y1 = source.x, source.y + _HEIGHT / 2, target.x, target.y - _HEIGHT / 2
        return f"M{x0:.0f},{y0:.0f} L{x1:.0f},{y1:.0f}", (x0, y0)
    x0, y0, x1, y1 = source.x, source.y + _HEIGHT / 2, target.x + half / 2, target.y + _HEIGHT / 2
    if source is target:
        x0 = source.x - half / 2
    low = max(y0, y1) + 20 + 7 * delay + abs(x1 - x0) / 14
    label = ((x0 + x1) / 2, low - (low - max(y0, y1)) / 4 + 6)
    return f"M{x0:.0f},{y0:.0f} C{x0:.0f},{low:.0f} {x1:.0f},{low:.0f} {x1:.0f},{y1:.0f}", label


def _columns(graph: RecurrentGraph, names: list[str]) -> list[list[str]]:
    depth: dict[str, int] = {}
    for name in names:
        before = [depth[e.source] + 1 for e in graph.incoming(name) if e.delay == 0 and e.source in depth]
        depth[name] = max(before, default=0)
    return [[n for n in names if depth[n] == d] for d in range(max(depth.values()) + 1)]


def _kind(graph: RecurrentGraph, name: str) -> str:
    node = graph.nodes[name]
    if name in graph.inputs:
        return f"input, {node.size}"
    if node.period:
        return f"every {node.period} steps"
    product = " of product" if node.aggregation == "product" else ""
    return f"{node.activation}{product}, {node.size}"
