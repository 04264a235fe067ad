"""Files as an attacker or a failing disk leaves them, drawn from fixed seeds: a failure can be reproduced."""

import json
import random
from collections.abc import Callable
from typing import Any

from data.errors import UserError

ODD = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\n", b"{", b"[" * 3000, b"9" * 400, b"=1+1", b"-", b"NaN", b"1e999"]
VALUES: list[Any] = [None, True, -1, 0, 2**63, 10**30, 1e308, float("nan"), "", "../../x", "/etc/passwd", "\0", [], {}]


def mutated(content: bytes, seed: int) -> bytes:
    """The same with a few changes: bits, cuts, repeats, noise, and what parsers stumble over."""
    draw, found = random.Random(seed), bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(len(found) + 1)
        end = min(len(found), place + draw.choice((1, 4, 64, 1000)))
        kind = draw.randrange(6)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[place:]
        elif kind == 2:
            del found[place:end]
        elif kind == 3:
            found[place:place] = found[place:end]
        elif kind == 4:
            found[place:end] = bytes(draw.randrange(256) for _ in range(end - place))
        else:
            found[place:place] = draw.choice(ODD)
    return bytes(found)


def changed(tree: Any, seed: int) -> Any:
    """A tree of JSON in which a value is of another kind, or a key is missing or too much."""
    draw, copy = random.Random(seed), json.loads(json.dumps(tree))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(copy)
    node, key = draw.choice(places)
    if (kind := draw.randrange(8)) == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node["unheard-of"] = 1
    else:
        node[key] = draw.choice(VALUES)
    return copy


def outcome(work: Callable[[], Any]) -> str:
    """What the UserError says that came of it; "" where there was none. Any other exception is a fault."""
    try:
        work()
    except UserError as error:
        assert str(error)
        return str(error)
    return ""


def check_variety(outcomes: list[str]) -> None:
    """Cases that all fail in the same line would test one line."""
    assert len(set(outcomes)) > 3, set(outcomes)
