"""What every section of ``params.yaml`` has in common, and how one is read.

A section is a frozen pydantic model that refuses unknown keys and converts nothing. A field marked :func:`operational`
decides how a stage works but not what it writes (how often it checkpoints, how many threads read): DVC does not depend
on it and it is no part of a version's identity. Every other field is named in ``dvc.yaml``; a test keeps them in step.
"""

import copy
import difflib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tasks import paths
from tasks.errors import BadParameter

_LONGEST_FOUND = 100


class Section(BaseModel):
    """A part of ``params.yaml``."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    # Fields that say how the work is cut. Work begun with others can be gone on with, only not to the same bytes.
    CUT: ClassVar[tuple[str, ...]] = ()

    def identity(self) -> dict[str, Any]:
        """The fields that decide what the stage writes, as plain values."""
        whole = self.model_dump(mode="json")
        for name in type(self).model_fields:
            if isinstance(inner := getattr(self, name), Section):
                whole[name] = inner.identity()
        return {name: whole[name] for name, field in type(self).model_fields.items() if not is_operational(field)}


SectionType = TypeVar("SectionType", bound=Section)


def operational(**constraints: Any) -> Any:
    """A field that decides how a stage works, not what it writes."""
    return Field(json_schema_extra={"operational": True}, **constraints)


def is_operational(field: FieldInfo) -> bool:
    """Whether ``field`` was declared with :func:`operational`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("operational"))


def read_section(name: str, section: type[SectionType], path: Path = paths.PARAMS) -> SectionType:
    """Returns the section ``name`` of the file ``path``. Raises :class:`BadParameter`, naming each wrong key."""
    content = read_yaml(path)
    if name not in content:
        raise BadParameter(f"{path}: the section '{name}' is missing; add it with the keys that the stage needs.")
    return validate(section, content[name], path, name)


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in ``path``. Raises :class:`BadParameter` where there is no file or no YAML mapping."""
    try:
        return parse_yaml(path.read_bytes(), path)
    except FileNotFoundError:
        raise BadParameter(f"{path}: no such file. Run this in the project's folder, where {path.name} lies.") from None
    except OSError as error:
        raise BadParameter(f"{path}: cannot be read ({error.strerror}). It has to be a text file.") from None


def parse_yaml(text: bytes, path: Path) -> dict[str, Any]:
    """Returns the mapping in ``text``, which is that of ``path``. Raises :class:`BadParameter` where it is none."""
    try:
        content = copy.deepcopy(_loaded(text))
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise BadParameter(f"{path}: {line}this is not YAML ({error.problem}). Mend that line.") from None
    except (YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise BadParameter(f"{path}: this is not YAML in UTF-8 ({reason}). Mend that place.") from None
    if not isinstance(content, dict):
        raise BadParameter(f"{path}: expected sections (collect:, ingest:, ...), found {type(content).__name__}.")
    return content


@functools.lru_cache
def _loaded(text: bytes) -> Any:
    # A stage's processes read the same file up to six times, and each time takes a tenth of a second.
    return YAML(typ="safe", pure=True).load(text)


def validate(section: type[SectionType], content: object, path: Path, prefix: str = "") -> SectionType:
    """Returns ``content`` as a ``section``; each fault becomes 'file: key: what is wrong', joined by '; '."""
    try:
        return section.model_validate(content)
    except ValidationError as error:
        faults: list[dict[str, Any]] = [{**fault, "loc": _keys(fault["loc"], content)} for fault in error.errors()]
        meant = {
            fault["loc"]: name
            for fault in faults
            if fault["type"] == "extra_forbidden" and (name := _meant(section, fault["loc"], content))
        }
        # A key that is only spelt wrongly is one fault, not also one that is missing.
        right = {(*place[:-1], name) for place, name in meant.items()}
        told = [_describe(fault, prefix, meant.get(fault["loc"])) for fault in faults if fault["loc"] not in right]
        raise BadParameter(f"{path}: " + "; ".join(told)) from None


def _keys(place: Sequence[int | str], content: Any) -> tuple[int | str, ...]:
    # pydantic also names which kind of value it took a mapping for, which is no key of it.
    *above, last = place or ("",)
    keys: list[int | str] = []
    for part in above:
        if isinstance(content, dict) and part not in content:
            continue
        keys.append(part)
        inner = content.get(part) if isinstance(content, dict) else None
        content = content[int(part)] if isinstance(content, list) else inner
    return (*keys, last) if place else ()


def _meant(section: type[Section], place: Sequence[int | str], content: object) -> str | None:
    """Returns the key that the unknown one at ``place`` of ``content`` resembles, or None."""
    known = {name for found in _sections_at(section, place[:-1], content) for name in found.model_fields}
    close = difflib.get_close_matches(str(place[-1]), sorted(known), n=1)
    return close[0] if close else None


def _sections_at(section: type[BaseModel], place: Sequence[int | str], content: Any) -> Iterator[type[BaseModel]]:
    if not place:
        yield section
        return
    name, *rest = place
    field = section.model_fields.get(str(name))
    if field is not None:
        content = content.get(name) if isinstance(content, dict) else None
        # The number of an item of a list leads to no other section.
        below = [part for part in rest if isinstance(part, str)]
        kinds = list(_sections_in(field.annotation))
        # Of several kinds, the one that the content says it is.
        for inner in [kind for kind in kinds if _says_that_it_is(kind, content)] or kinds:
            yield from _sections_at(inner, below, content)


def _says_that_it_is(kind: type[BaseModel], content: object) -> bool:
    fixed = {
        name: get_args(field.annotation)
        for name, field in kind.model_fields.items()
        if get_origin(field.annotation) is Literal
    }
    return isinstance(content, dict) and all(content.get(name) in values for name, values in fixed.items())


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _describe(fault: Any, prefix: str, meant: str | None) -> str:
    where = ".".join(str(part) for part in (prefix, *fault["loc"]) if part != "")
    found = fault.get("input")
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key; " + (f"did you mean `{meant}`?" if meant else "remove it or mend its spelling")
    if fault["type"] == "missing":
        return f"{where}: missing; add it"
    if fault["type"] in ("model_type", "model_attributes_type"):
        return f"{where}: keys with values are needed here, found {_short(found)}"
    if fault["type"] == "union_tag_not_found":
        return f"{where}.{_unquoted(fault['ctx']['discriminator'])}: missing; add it"
    if fault["type"] == "union_tag_invalid":
        name, tag, known = (fault["ctx"][key] for key in ("discriminator", "tag", "expected_tags"))
        return f"{where}.{_unquoted(name)}: input should be one of {known}, found '{tag}'"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, found {_short(found)}"


def _unquoted(text: str) -> str:
    return text.strip("'")


def _short(found: object) -> str:
    written = repr(found)
    return written if len(written) <= _LONGEST_FOUND else written[:_LONGEST_FOUND] + "…"
