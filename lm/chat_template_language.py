"""The language of chat templates: jinja2 in a sandbox, with what transformers adds to it. Imports no torch."""

import json
from collections.abc import Sized
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment


class _Generation(Extension):
    """``{% generation %}``, which marks what the model wrote for training; here it is what stands in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own, in which products, powers and repetitions are no longer than a range may be in that."""

    # What is in here is not computed while a template is compiled either.
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _length(operator, left, right) > MAX_RANGE:
            raise jinja2.TemplateRuntimeError(f"what {operator} makes is too long; at most {MAX_RANGE:,} is computed")
        return super().call_binop(context, operator, left, right)


def _length(operator: str, left: object, right: object) -> int:
    """Returns how many bits a whole number, or how many items a repetition, may come to; 0 for anything else."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    for repeated, times in ((left, right), (right, left)):
        if isinstance(repeated, Sized) and isinstance(times, int):
            return len(repeated) * times
    return 0


def environment() -> ImmutableSandboxedEnvironment:
    """Returns what templates are made in; what one of them refuses it raises as :class:`jinja2.TemplateError`."""
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    # Jinja's own escapes what HTML needs escaped.
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    return made


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
