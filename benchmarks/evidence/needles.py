"""Byte texts for language models: windows of source files, and needles hidden in them (S-NIAH 1 to 3 and MK-1, small).

A needle is the line `# key WORD = VALUE`; the question `# key WORD ? ` is the end of the text, and VALUE the answer.

| task | haystack | value | needles |
|---|---|---|---|
| single-1 | one sentence, over and over | 5 digits | 1 |
| single-2 | source files | 5 digits | 1 |
| single-3 | source files | 12 hexadecimal digits | 1 |
| multikey-1 | source files | 5 digits | 4, one of them asked for |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_SENTENCE = b"# the grass is green. the sky is blue. the sun is yellow. here we go. there and back again.\n"
_LETTERS, _DIGITS, _HEX = b"abcdefghijklmnopqrstuvwxyz", b"0123456789", b"0123456789abcdef"
_WORD = 4


@dataclass(frozen=True)
class Needles:
    """A row of the table above."""

    sources: bool = True
    alphabet: bytes = _DIGITS
    digits: int = 5
    count: int = 1


TASKS = {
    "single-1": Needles(sources=False),
    "single-2": Needles(),
    "single-3": Needles(alphabet=_HEX, digits=12),
    "multikey-1": Needles(count=4),
}
# What training texts hold: four needles, and all are asked for.
TRAINED = (Needles(count=4), Needles(count=4, alphabet=_HEX, digits=12))


class Asked(NamedTuple):
    """tokens [B, T], and where the values stand that the model is to say: [B, T], true at their bytes."""

    tokens: Tensor
    values: Tensor


class Corpus:
    """Windows of texts, drawn on a device. `whole` texts are at least as long as a window, which begins inside them."""

    def __init__(self, texts: list[bytes], device: str) -> None:
        self.texts, self.device = texts, device
        joined = bytearray(b"\n\n".join(texts))
        self.bytes = torch.frombuffer(joined, dtype=torch.uint8).to(device)

    def windows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Tokens [count, length] from anywhere in the joined texts."""
        starts = torch.randint(len(self.bytes) - length, (count, 1), generator=generator).to(self.device)
        return self.bytes[starts + torch.arange(length, device=self.device)].long()

    def inside(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Tokens [count, length], each window from the beginning of one text that is as long."""
        long = [text for text in self.texts if len(text) >= length]
        chosen = torch.randperm(len(long), generator=generator)[:count].tolist()
        return torch.stack([torch.tensor(list(long[number][:length])) for number in chosen]).to(self.device)

    def haystack(self, length: int, generator: torch.Generator) -> bytes:
        """Some text of so many bytes."""
        text = self.texts[_below(len(self.texts), generator)]
        while len(text) < length:
            text += b"\n" + self.texts[_below(len(self.texts), generator)]
        start = _below(len(text) - length + 1, generator)
        return text[start : start + length]


def asked(corpus: Corpus, task: Needles, count: int, length: int, generator: torch.Generator) -> Asked:
    """Texts that end with one question and its answer."""
    rows = [_row(corpus, task, length, 1, generator) for _ in range(count)]
    return Asked(*(torch.stack(parts).to(corpus.device) for parts in zip(*rows, strict=True)))


def planted(corpus: Corpus, windows: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The windows, of which a share are replaced by texts with needles that are asked for further on."""
    for row in range(round(share * len(windows))):
        task = TRAINED[_below(len(TRAINED), generator)]
        windows[row] = _row(corpus, task, windows.shape[1], task.count, generator)[0].to(windows.device)
    return windows


def _row(
    corpus: Corpus, task: Needles, length: int, questions: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One text and its values. The last question ends the text, the others stand anywhere behind their needles."""
    words = _different(task.count, generator)
    values = [_drawn(task.alphabet, task.digits, generator) for _ in words]
    lines = [b"\n# key %s = %s\n" % pair for pair in zip(words, values, strict=True)]
    questioned = [b"\n# key %s ? %s" % pair for pair in zip(words, values, strict=True)][:questions]
    room = length - sum(map(len, lines)) - sum(map(len, questioned))
    hay = corpus.haystack(room, generator) if task.sources else (_SENTENCE * (room // len(_SENTENCE) + 1))[:room]
    # (place in the haystack, text, bytes at its end that are an answer); questions come behind needles of one place.
    places = [_below(room, generator) for _ in lines]
    inserts = [(place, 0, line, 0) for place, line in zip(places, lines, strict=True)]
    for number, (place, question) in enumerate(zip(places, questioned, strict=False)):
        last = number == len(questioned) - 1
        inserts.append((room if last else place + _below(room - place, generator), 1, question, task.digits))
    text, answers, done = b"", [], 0
    for place, _, line, answer in sorted(inserts, key=lambda insert: insert[:2]):
        text += hay[done:place] + line
        answers += [len(text) - answer + i for i in range(answer)]
        done = place
    tokens, mask = torch.tensor(list(text)), torch.zeros(len(text), dtype=torch.bool)
    mask[answers] = True
    return tokens, mask


def _different(count: int, generator: torch.Generator) -> list[bytes]:
    words: dict[bytes, None] = {}
    while len(words) < count:
        words[_drawn(_LETTERS, _WORD, generator)] = None
    return list(words)


def _drawn(alphabet: bytes, length: int, generator: torch.Generator) -> bytes:
    return bytes(alphabet[i] for i in torch.randint(len(alphabet), (length,), generator=generator).tolist())


def _below(most: int, generator: torch.Generator) -> int:
    return int(torch.randint(most, (), generator=generator))
