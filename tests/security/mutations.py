"""Files as an attacker or a failing disk leaves them, drawn from fixed seeds: a failure can be reproduced."""

import json
import random
from collections.abc import Callable
from typing import Any

from data.errors import UserError

ODD = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\n", b"{", b"[" * 3000, b"9" * 400, b"=1+1", b"-", b"NaN", b"1e999"]
VALUES: list[Any] = [None, True, -1, 0, 2**63, 10**30, 1e308, float("nan"), "", "../../x", "/etc/passwd", "\0", [], {}]


def mutated(content: bytes, seed: int) -> bytes:
    """Return the content with a few changes: bits, cuts, repeats, noise, and what breaks parsers."""
    draw, copy = random.Random(seed), bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        start = draw.randrange(len(copy) + 1)
        end = min(len(copy), start + draw.choice((1, 4, 64, 1000)))
        kind = draw.randrange(6)
        if kind == 0 and start < len(copy):
            copy[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del copy[start:]
        elif kind == 2:
            del copy[start:end]
        elif kind == 3:
            copy[start:start] = copy[start:end]
        elif kind == 4:
            copy[start:end] = bytes(draw.randrange(256) for _ in range(end - start))
        else:
            copy[start:start] = draw.choice(ODD)
    return bytes(copy)


def changed(tree: Any, seed: int) -> Any:
    """Return a JSON tree in which a value has another type, or a key is missing or unknown."""
    draw, copy = random.Random(seed), json.loads(json.dumps(tree))
    slots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            slots.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(copy)
    node, key = draw.choice(slots)
    if (kind := draw.randrange(8)) == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node["unheard-of"] = 1
    else:
        node[key] = draw.choice(VALUES)
    return copy


def outcome(work: Callable[[], Any]) -> str:
    """Return the message of the UserError that the work raises, or "" without one. Other exceptions are faults."""
    try:
        work()
    except UserError as error:
        assert str(error)
        return str(error)
    return ""


def check_variety(outcomes: list[str]) -> None:
    """Check that the cases do not all fail in the same line."""
    assert len(set(outcomes)) > 3, set(outcomes)
