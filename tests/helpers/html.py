"""What a page of HTML consists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "input", "br"}


@dataclass
class Element:
    """One element; `text` is that of all that it contains."""

    tag: str
    attributes: dict[str, str | None]
    parent: Element | None = None
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """The elements below with this tag and these attributes; `data_find` is `data-find`, `class_` contains."""
        found = []
        for child in self.children:
            if (not tag or child.tag == tag) and all(child.matches(k, v) for k, v in attributes.items()):
                found.append(child)
            found += child.all(tag, **attributes)
        return found

    def matches(self, name: str, value: str) -> bool:
        """Whether an attribute has a value, or a class is one of several."""
        given = self.attributes.get(name.rstrip("_").replace("_", "-")) or ""
        return value in given.split() if name == "class_" else value == given

    def inside(self, **attributes: str) -> bool:
        """Whether it is below such an element."""
        above = self.parent
        return above is not None and (
            all(above.matches(k, v) for k, v in attributes.items()) or above.inside(**attributes)
        )


class Page(HTMLParser):
    """A page as a tree; `root` is above its elements. Fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(text)
        assert self._open == [self.root], [e.tag for e in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        made = Element(tag, dict(attrs), self._open[-1])
        self._open[-1].children.append(made)
        if tag not in _VOID:
            self._open.append(made)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Element(tag, dict(attrs), self._open[-1]))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> ends a {self._open[-1].tag} at {self.getpos()}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def id(self, name: str) -> Element:
        """The element of an id."""
        (found,) = self.root.all(id=name)
        return found
