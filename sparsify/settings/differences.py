"""Settings in which two configs differ."""

import json
from collections.abc import Iterator


def differing_settings(name: str, before: object, now: object) -> Iterator[str]:
    """Yield `name` and its values, or those of the settings below it, where they differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            below = f"{name}.{key}".strip(".")
            yield from differing_settings(below, before.get(key), now[key])
    elif before != now:
        yield f"{name}: {json.dumps(now)} instead of {json.dumps(before)}"
