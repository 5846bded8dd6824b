"""A schedule for people: as text with an equation a node, and as a picture in SVG. Standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

from lightning_accel.recurrent.graph import Edge, RecurrentGraph, Stage

_HEIGHT, _GAP_X, _GAP_Y, _MARGIN, _TITLE, _LANE = 32, 76, 20, 22, 34, 22
_LETTER = 7  # width of one of a name, at most
_INK = {"once": "#0072b2", "step": "#555", "late": "#c33"}
_LEGEND = (
    ("once", "for all time steps at once"),
    ("step", "within a time step"),
    ("late", "from an earlier time step"),
)

ArrowKind = Literal["once", "step", "late"]


@dataclass(frozen=True)
class Box:
    """A node's place: its center, in units of points.

    Attributes:
        name: Of the node.
        kind: What it computes, in small letters below its name.
        x, y: Of the center.
        width: Of the box.
        frame: Index of the frame it stands in.
    """

    name: str
    kind: str
    x: float
    y: float
    width: float
    frame: int

    @property
    def left(self) -> float:
        """Where arrows arrive."""
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        """Where arrows leave."""
        return self.x + self.width / 2


@dataclass(frozen=True)
class Frame:
    """A stage: left, top, width and height, in points, and the y below which there is no box."""

    looped: bool
    x: float
    y: float
    width: float
    height: float
    floor: float


@dataclass(frozen=True)
class Arrow:
    """A connection, or the part that several connections share: SVG path data.

    Attributes:
        kind: ``once`` leads from stage to stage, ``step`` stays within a loop, ``late`` is delayed.
        path: Its line.
        tip: Whether it ends at a node.
        label: Text and its place (x, y), if it has one.
    """

    kind: ArrowKind
    path: str
    tip: bool = True
    label: tuple[str, float, float] | None = None


@dataclass(frozen=True)
class Picture:
    """What is to be drawn, in points."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    frames: tuple[Frame, ...]
    arrows: tuple[Arrow, ...]


def schedule_text(graph: RecurrentGraph) -> str:
    """Describe the schedule: a stage with its equations after another, in the order in which they run.

    Example:
        >>> from lightning_accel.recurrent import Edge, Node, RecurrentGraph, schedule_text
        >>> graph = RecurrentGraph([Node("x", 2), Node("y", 4)], [Edge("x", "y")], inputs=["x"], outputs=["y"])
        >>> print(schedule_text(graph))  # doctest: +ELLIPSIS
         1. all time steps at once
        ...
    """
    lines: list[str] = []
    longest = max(map(len, graph.nodes))
    for index, stage in enumerate(graph.schedule):
        after = f", after {', '.join(str(a + 1) for a in stage.after)}" if stage.after else ""
        how = "step by step, a step in this order" if stage.loop else "all time steps at once"
        ahead = _products_ahead(graph, stage)
        if ahead:
            lines.append(f"    before stage {index + 1}, for all time steps at once: {', '.join(ahead)}")
        lines.append(f"{index + 1:>2}. {how}{after}")
        lines += [f"      {name:<{longest}} = {_equation(graph, name)}" for name in stage.nodes]
    if any(stage.loop for stage in graph.schedule):
        lines.append("The backward takes the loops from the last step to the first; the gradient of each W is one")
        lines.append("product over all time steps after them. v[t-1] is the value of v one time step earlier.")
    return "\n".join(lines)


def lay_out(graph: RecurrentGraph) -> Picture:
    """Place stages from left to right by what they wait for, and a loop's nodes in the order of one step."""
    boxes: dict[str, Box] = {}
    frames: list[Frame] = []
    left = float(_MARGIN)
    for looped, columns in _groups(graph):
        width = max(_LETTER * max(len(n) for c in columns for n in c) + 18, 96)
        tall = max(len(c) for c in columns)
        side = _GAP_X // 2 if looped else _MARGIN
        inner = len(columns) * (width + _GAP_X) - _GAP_X + 2 * side
        for k, column in enumerate(columns):
            for row, name in enumerate(column):
                x = left + side + k * (width + _GAP_X) + width / 2
                y = _MARGIN + _TITLE + (row + (tall - len(column)) / 2) * (_HEIGHT + _GAP_Y) + _HEIGHT / 2
                boxes[name] = Box(name, _kind(graph, name), x, y, width, len(frames))
        floor = _MARGIN + _TITLE + tall * (_HEIGHT + _GAP_Y)
        frames.append(Frame(looped, left, _MARGIN, inner, floor - _MARGIN, floor))
        left += inner + _GAP_X
    late, lanes = _delayed_arrows(graph, boxes, frames)
    frames = [replace(f, height=f.height + _LANE * lanes.get(k, 0)) for k, f in enumerate(frames)]
    bottom = max(f.y + f.height for f in frames) + _LANE * lanes.get(-1, 0)
    return Picture(
        max(left - _GAP_X + _MARGIN, 620.0),
        bottom + 44,
        tuple(boxes.values()),
        tuple(frames),
        (*_direct_arrows(graph, boxes), *late),
    )


def schedule_svg(graph: RecurrentGraph) -> str:
    """Draw the schedule as SVG: a blue frame runs for all time steps at once, a red one step by step.

    Example:
        >>> from lightning_accel.recurrent import Edge, Node, RecurrentGraph, schedule_svg
        >>> graph = RecurrentGraph([Node("x", 2), Node("y", 4)], [Edge("x", "y")], inputs=["x"], outputs=["y"])
        >>> schedule_svg(graph).startswith("<svg")
        True
    """
    picture = lay_out(graph)
    size = f'width="{picture.width:.0f}" height="{picture.height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {picture.width:.0f} {picture.height:.0f}" '
        'font-family="sans-serif" font-size="12"><defs>',
        *(
            f'<marker id="{kind}" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
            f'<path d="M0,0 L7,3 L0,6 z" fill="{ink}"/></marker>'
            for kind, ink in _INK.items()
        ),
        f'</defs><rect {size} fill="white"/>',
    ]
    for frame in picture.frames:
        fill, ink = ("#fdeeea", _INK["late"]) if frame.looped else ("#eaf3fb", _INK["once"])
        title = "step by step" if frame.looped else "all steps at once"
        parts.append(
            f'<rect x="{frame.x:.0f}" y="{frame.y:.0f}" width="{frame.width:.0f}" height="{frame.height:.0f}" rx="8" '
            f'fill="{fill}" stroke="{ink}"/><text x="{frame.x + 10:.0f}" y="{frame.y + 18:.0f}" fill="{ink}">'
            f"{title}</text>"
        )
    for arrow in picture.arrows:
        parts.append(_line(arrow.kind, arrow.path, tip=arrow.tip))
        if arrow.label is not None:
            text, x, y = arrow.label
            parts.append(
                f'<text x="{x:.0f}" y="{y:.0f}" fill="{_INK[arrow.kind]}" font-size="10" text-anchor="end">'
                f"{escape(text)}</text>"
            )
    for box in picture.boxes:
        parts += [
            f'<rect x="{box.left:.0f}" y="{box.y - _HEIGHT / 2:.0f}" width="{box.width:.0f}" height="{_HEIGHT}" '
            'rx="5" fill="white" stroke="#333"/>',
            f'<text x="{box.x:.0f}" y="{box.y - 1:.0f}" text-anchor="middle">{escape(box.name)}</text>',
            f'<text x="{box.x:.0f}" y="{box.y + 11:.0f}" text-anchor="middle" fill="#666" font-size="9">'
            f"{escape(box.kind)}</text>",
        ]
    y = picture.height - 18
    for k, (kind, meaning) in enumerate(_LEGEND):
        x = _MARGIN + 200 * k
        parts.append(_line(kind, f"M{x},{y:.0f} H{x + 30}", tip=False))
        parts.append(f'<text x="{x + 38}" y="{y + 4:.0f}" fill="#666" font-size="11">{meaning}</text>')
    return "\n".join([*parts, "</svg>"])


def _line(kind: str, path: str, *, tip: bool) -> str:
    dashes = ' stroke-dasharray="5 3"' if kind == "late" else ""
    end = f' marker-end="url(#{kind})"' if tip else ""
    return f'<path d="{path}" fill="none" stroke="{_INK[kind]}"{dashes}{end}/>'


def _groups(graph: RecurrentGraph) -> list[tuple[bool, list[list[str]]]]:
    """Return what stands in one frame, from left to right: whether it is a loop, and its columns."""
    level: list[int] = []
    for stage in graph.schedule:
        level.append(max((level[a] + 1 for a in stage.after), default=0))
    groups: list[tuple[bool, list[list[str]]]] = []
    for depth in range(max(level) + 1):
        here = [s for s, at in zip(graph.schedule, level, strict=True) if at == depth]
        plain = [n for s in here if not s.loop for n in s.nodes]
        if plain:
            groups.append((False, [plain]))
        groups += [(True, _columns(graph, s.nodes)) for s in here if s.loop]
    return groups


def _columns(graph: RecurrentGraph, names: Sequence[str]) -> list[list[str]]:
    depth: dict[str, int] = {}
    for name in names:
        before = [depth[e.source] + 1 for e in graph.incoming(name) if e.delay == 0 and e.source in depth]
        depth[name] = max(before, default=0)
    return [[n for n in names if depth[n] == d] for d in range(max(depth.values()) + 1)]


def _direct_arrows(graph: RecurrentGraph, boxes: dict[str, Box]) -> list[Arrow]:
    arrows = []
    for edge in graph.edges:
        if edge.delay:
            continue
        a, b = boxes[edge.source], boxes[edge.target]
        kind: ArrowKind = "step" if a.frame == b.frame else "once"
        # A long arrow keeps to a row that is free until it is there, so that it crosses no box.
        between = [box for box in boxes.values() if a.right < box.left and box.right < b.left]
        free = [y for y in (a.y, b.y) if all(abs(box.y - y) > _HEIGHT / 2 + 4 for box in between)]
        row = free[0] if free else max((box.y for box in between), default=a.y) + _HEIGHT / 2 + _GAP_Y / 2
        x0, x1 = a.right, b.left
        if between:
            first, last = min(box.left for box in between), max(box.right for box in between)
            path = f"M{x0:.0f},{a.y:.0f} {_bend((x0, a.y), (first, row))} H{last:.0f} {_bend((last, row), (x1, b.y))}"
        else:
            path = f"M{x0:.0f},{a.y:.0f} {_bend((x0, a.y), (x1, b.y))}"
        arrows.append(Arrow(kind, path))
    return arrows


def _bend(start: tuple[float, float], end: tuple[float, float]) -> str:
    middle = (start[0] + end[0]) / 2
    return f"C{middle:.0f},{start[1]:.0f} {middle:.0f},{end[1]:.0f} {end[0]:.0f},{end[1]:.0f}"


def _delayed_arrows(
    graph: RecurrentGraph, boxes: dict[str, Box], frames: Sequence[Frame]
) -> tuple[list[Arrow], dict[int, int]]:
    """Lead what is delayed below the boxes: a line for each node and delay, and a branch to each of its targets.

    Returns:
        The arrows, and how many lines there are below each other in each frame; -1 stands for below all frames.
    """
    buses: dict[tuple[str, int], list[Edge]] = {}
    for edge in graph.edges:
        if edge.delay:
            buses.setdefault((edge.source, edge.delay), []).append(edge)
    lanes: dict[int, list[list[tuple[float, float]]]] = {}
    placed = []
    order = {bus: boxes[bus[0]].right - min(boxes[e.target].left for e in edges) for bus, edges in buses.items()}
    for bus in sorted(buses, key=lambda b: (order[b], b[1])):
        source, targets = boxes[bus[0]], [boxes[e.target] for e in buses[bus]]
        home = source.frame if all(t.frame == source.frame for t in targets) else -1
        span = (min(t.left for t in targets) - _GAP_X, max(source.right, *(t.left for t in targets)) + _GAP_X / 2)
        here = lanes.setdefault(home, [])
        lane = next((k for k, spans in enumerate(here) if all(s[1] < span[0] or span[1] < s[0] for s in spans)), None)
        if lane is None:
            lane = len(here)
            here.append([])
        here[lane].append(span)
        placed.append((bus, home, lane))
    counts = {home: len(spans) for home, spans in lanes.items()}
    lowest = max(f.y + f.height + _LANE * counts.get(k, 0) for k, f in enumerate(frames))
    arrows = []
    for (name, delay), home, lane in placed:
        source, edges = boxes[name], buses[name, delay]
        y = lowest + _LANE * (lane + 0.9) if home < 0 else frames[home].floor + _LANE * (lane + 0.5)
        down = source.right + 7 + 5 * (lane % 4)
        risers = {boxes[e.target].left: boxes[e.target].left - 13 - 6 * (lane % 4) for e in edges}
        ends = sorted([down, *risers.values()])
        steps = "1 step" if delay == 1 else f"{delay} steps"
        label = f"{name}, {steps} earlier"
        trunk = f"M{source.right:.0f},{source.y + 8:.0f} H{down:.0f} V{y:.0f} M{ends[-1]:.0f},{y:.0f} H{ends[0]:.0f}"
        for left, x in risers.items():
            top = min(boxes[e.target].y for e in edges if boxes[e.target].left == left)
            trunk += f" M{x:.0f},{y:.0f} V{top + 8:.0f}"
        arrows.append(Arrow("late", trunk, tip=False, label=(label, down - 6, y - 4)))
        for edge in edges:
            target = boxes[edge.target]
            arrows.append(Arrow("late", f"M{risers[target.left]:.0f},{target.y + 8:.0f} H{target.left:.0f}"))
    return arrows, counts


def _products_ahead(graph: RecurrentGraph, stage: Stage) -> list[str]:
    """Name the products of a loop whose factors are known before it."""
    if not stage.loop:
        return []
    found: dict[tuple[str, int], list[str]] = {}
    for name in stage.nodes:
        for edge in graph.incoming(name):
            if edge.connection == "full" and edge.source not in stage.nodes:
                found.setdefault((edge.source, edge.delay), []).append(name)
    return [f"W {_past(source, delay)} of {', '.join(names)}" for (source, delay), names in found.items()]


def _past(name: str, delay: int) -> str:
    return f"{name}[t-{delay}]" if delay else name


def _equation(graph: RecurrentGraph, name: str) -> str:
    """Write what a node computes from what."""
    node = graph.nodes[name]
    if name in graph.inputs:
        return f"input of {node.size}"
    if node.period:
        return f"1 at every {node.period} steps, else 0"
    factor = {"full": "W ", "diagonal": "w * ", "identity": "", "broadcast": ""}
    terms = [f"{factor[e.connection]}{_past(e.source, e.delay)}" for e in graph.incoming(name)]
    if node.bias:
        terms.append("b")
    if node.aggregation == "product":
        inner = " * ".join(f"({t})" if t.startswith("W ") and len(terms) > 1 else t for t in terms)
    else:
        inner = " + ".join(terms)
    if node.activation == "linear":
        return inner
    if node.activation == "one_minus":
        return f"1 - ({inner})" if len(terms) > 1 else f"1 - {inner}"
    return f"{node.activation}({inner})"


def _kind(graph: RecurrentGraph, name: str) -> str:
    node = graph.nodes[name]
    if name in graph.inputs:
        return f"input, {node.size}"
    if node.period:
        return f"every {node.period} steps"
    what = {"linear": node.aggregation, "one_minus": "1 - input"}.get(node.activation, node.activation)
    product = " of product" if node.aggregation == "product" and what == node.activation else ""
    return f"{what}{product}, {node.size}"
