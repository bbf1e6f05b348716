"""Conversations as the corpus keeps them: a JSON list of ``{"role": ..., "content": ...}``, perhaps with a ``name``.

There is one spelling for each.
"""

import json

from tasks.ingest.normalize import normalize

# Those of lm.chat_template.Role.
_ROLES = ("system", "user", "assistant")


def as_text(messages: object) -> str:
    """Returns ``messages``, a list of objects with a role, a content and perhaps a name, as text; it is normalized.

    Raises :class:`ValueError` that says what is wrong with them, and nothing of what they hold.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("no list of messages")
    turns = [_turn(number, message) for number, message in enumerate(messages, start=1)]
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise ValueError("no answer of the assistant")
    return json.dumps(turns, ensure_ascii=False, separators=(",", ":"))


def _turn(number: int, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is no object")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"message {number} has no role of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text as content")
    found = {"role": role, "content": normalize(content)}
    if (speaker := message.get("name")) is not None:
        if not isinstance(speaker, str):
            raise ValueError(f"message {number} has no text as name")
        found["name"] = normalize(speaker)
    # A call of a tool, or a weight: what is left out would be learned as something else than it is.
    if more := sum(value is not None for name, value in message.items() if name not in ("role", "content", "name")):
        raise ValueError(f"message {number} has {more} more fields than role, content and name")
    return found
