"""Picture: where the boxes of a drawing stand, by grandalf's layers of a directed graph (Sugiyama)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llcompile.look.mixer_look import Box, Drawing

_CHARACTER, _PADDING, _HEIGHT = 6.7, 14.0, 34.0
_GAP_X, _GAP_Y, _MARGIN = 10.0, 22.0, 6.0


@dataclass(frozen=True)
class Placed:
    """A box with its left upper corner and its size."""

    box: Box
    x: float
    y: float
    width: float
    height: float = _HEIGHT


@dataclass(frozen=True)
class Picture:
    """A drawing with places, ready for SVG; an edge is the `d` of a path."""

    boxes: tuple[Placed, ...]
    edges: tuple[str, ...]
    width: float
    height: float


def lay_out(drawing: Drawing) -> Picture:
    """Places for all boxes, from top to bottom in the direction of the edges."""
    from grandalf.graphs import Edge, Graph, Vertex
    from grandalf.layouts import SugiyamaLayout

    vertices = {box.name: Vertex(box) for box in drawing.boxes}
    for vertex in vertices.values():
        vertex.view = _View(_width(vertex.data), _HEIGHT)
    links = [Edge(vertices[a], vertices[b]) for a, b in drawing.edges]
    for link in links:
        link.view = _Route()
    graph = Graph(vertices.values(), links)
    placed: list[Placed] = []
    edges: list[str] = []
    left = _MARGIN
    for component in graph.C:
        layout = SugiyamaLayout(component)
        layout.xspace, layout.yspace = _GAP_X, _GAP_Y
        layout.init_all()
        layout.draw(3)
        tops = [(v, *v.view.xy) for v in component.sV]
        shift = left - min(x - v.view.w / 2 for v, x, _ in tops)
        rise = _MARGIN - min(y - v.view.h / 2 for v, _, y in tops)
        new = [Placed(v.data, x - v.view.w / 2 + shift, y - v.view.h / 2 + rise, v.view.w) for v, x, y in tops]
        edges.extend(_path(edge, shift, rise) for edge in component.sE)
        placed.extend(new)
        left = max(p.x + p.width for p in new) + _GAP_X
    height = max((p.y + p.height for p in placed), default=0.0) + _MARGIN
    return Picture(tuple(placed), tuple(edges), left - _GAP_X + _MARGIN, height)


class _View:
    """What grandalf wants to know of a vertex, and where it puts it."""

    def __init__(self, width: float, height: float) -> None:
        self.w, self.h = width, height
        self.xy = (0.0, 0.0)


class _Route:
    """Where grandalf leads an edge: middle to middle."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def setpath(self, points: list[tuple[float, float]]) -> None:
        """Called by grandalf."""
        self.points = points


def _width(box: Box) -> float:
    count = f" x{box.count}" if box.count > 1 else ""
    return max(len(box.title + count), len(box.detail)) * _CHARACTER + _PADDING


def _path(edge: Any, shift: float, rise: float) -> str:
    """From the lower side of a box to the upper side of the next, by the places kept free in the layers between."""
    points = [[x + shift, y + rise] for x, y in edge.view.points]
    down = 1 if points[-1][1] >= points[0][1] else -1
    points[0][1] += down * _HEIGHT / 2
    points[-1][1] -= down * _HEIGHT / 2
    return _curve(points)


def _curve(points: list[list[float]]) -> str:
    """A path that leaves and meets each point vertically."""
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (y0 + y1) / 2
        parts.append(f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}")
    return "".join(parts)
