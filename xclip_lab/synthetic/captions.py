"""A small grammar: events in words, each word with its class and the event it speaks of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xclip_lab.synthetic.scenes import Action

WordClass = Literal["colour", "shape", "motion", "order", "function"]

TEMPLATES = {
    1: ("{0}", "at some point {0}"),
    2: (
        "{0}, then {1}",
        "first {0}, then {1}",
        "{0} before {1}",
        "after {0}, {1}",
    ),
}
"""By the number of events told; the caption always tells them in the order in which they happen."""


@dataclass(frozen=True)
class Word:
    """One whitespace-separated word. `event` counts the events told, None for order and function words."""

    text: str
    kind: WordClass
    event: int | None = None


def describe(actions: tuple[Action, ...], template: int) -> list[Word]:
    """The caption's words; `" ".join` of their texts is the caption."""
    words: list[Word] = []
    for token in TEMPLATES[len(actions)][template].split():
        if not token.startswith("{"):
            words.append(Word(token, "order"))
            continue
        event, punctuation = int(token[1]), token[3:]
        words += _clause(actions[event], event)
        last = words[-1]
        words[-1] = Word(last.text + punctuation, last.kind, last.event)
    return words


def _clause(action: Action, event: int) -> list[Word]:
    """`a red circle moves left` or `a red circle meets a green star`."""
    phrases = [
        [
            Word(_article(thing.colour), "function"),
            Word(thing.colour, "colour", event),
            Word(thing.shape, "shape", event),
        ]
        for thing in action.things
    ]
    verb = [Word(text, "motion", event) for text in action.verb.split()]
    return phrases[0] + verb + [word for phrase in phrases[1:] for word in phrase]


def _article(colour: str) -> str:
    return "an" if colour[0] in "aeiou" else "a"
