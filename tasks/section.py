"""What every section of ``params.yaml`` has in common, and how one is read.

A section is a frozen pydantic model that refuses unknown keys and converts nothing. A field marked :func:`operational`
decides how a stage works but not what it writes (how often it checkpoints, how many threads read): DVC does not depend
on it and it is no part of a version's identity. Every other field is named in ``dvc.yaml``; a test keeps them in step.
"""

import copy
import difflib
import functools
from collections import Counter
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
_MANY = 3


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
    return bool(_extra(field).get("operational"))


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


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
        faults = [{**fault, "loc": _place(fault, content)} for fault in error.errors()]
        raise BadParameter(f"{path}: " + "; ".join(_told(faults, section, content, prefix))) from None


def _told(faults: Sequence[dict[str, Any]], section: type[Section], content: object, prefix: str) -> Iterator[str]:
    meant = {
        fault["loc"]: name
        for fault in faults
        if fault["type"] == "extra_forbidden" and (name := _meant(section, fault["loc"], content))
    }
    # Where there are many of another kind, the mapping was one of that kind, and none of them is spelt wrongly.
    unknown = [fault["loc"] for fault in faults if fault["type"] == "extra_forbidden"]
    of_others = Counter(place[:-1] for place in unknown if _kinds_with(section, place))
    meant = {
        place: name for place, name in meant.items() if of_others[place[:-1]] < _MANY or not _kinds_with(section, place)
    }
    # A key that is only spelt wrongly is one fault, not also one that is missing.
    right = {(*place[:-1], name) for place, name in meant.items()}
    # What is wrong with several keys of one place is told once.
    alike: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
    for fault in faults:
        place = fault["loc"]
        if place in right:
            continue
        kinds_with = _kinds_with(section, place) if fault["type"] == "extra_forbidden" else []
        one, several = _described(fault, meant.get(place), kinds_with)
        together = (place[:-1], several) if several else (place, one)
        alike.setdefault(together, []).append((_path(prefix, *place), one))
    for (place, several), found in alike.items():
        if len(found) == 1:
            where, one = found[0]
            yield f"{where}: {one}" if where else one
        else:
            keys = _and([where.rpartition(".")[2] for where, _ in found])
            yield f"{where}: {keys} {several}" if (where := _path(prefix, *place)) else f"{keys} {several}"


def _place(fault: Any, content: object) -> tuple[int | str, ...]:
    """Returns the keys that lead to what ``fault`` is about."""
    place = _keys(fault["loc"], content)
    # Of a mapping that is wrong as a whole, the kind that it was taken for is no key.
    if fault["type"] == "value_error" and place and place[-1] not in (_at(content, place[:-1]) or ()):
        place = place[:-1]
    # Where a key says which kind a mapping is, that key is wrong, and not the mapping.
    tag = fault.get("ctx", {}).get("discriminator")
    return place if tag is None else (*place, tag.strip("'"))


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
    """Returns the key that the unknown one at ``place`` of ``content`` resembles, or None.

    Another kind's key beside the one it resembles is not spelt wrongly.
    """
    known = {name for found in _sections_at(section, place[:-1], content) for name in found.model_fields}
    close = difflib.get_close_matches(str(place[-1]), sorted(known), n=1)
    if not close or (_kinds_with(section, place) and close[0] in _at(content, place[:-1])):
        return None
    return close[0]


def _at(content: Any, place: Sequence[int | str]) -> Any:
    return functools.reduce(lambda inner, key: inner[key], place, content)


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
    fixed = _fixed(kind).items()
    return isinstance(content, dict) and all(content.get(name) in values for name, values in fixed)


def _fixed(kind: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    """Returns the fields of ``kind`` that say what it is, and what they may be."""
    fields = kind.model_fields.items()
    return {name: get_args(field.annotation) for name, field in fields if get_origin(field.annotation) is Literal}


def _kinds_with(section: type[Section], place: Sequence[int | str]) -> list[str]:
    """Returns the values by which those kinds of the section at ``place`` are told apart that have its last key.

    A field may name those of them, its ``kinds``, that alone know it.
    """
    kinds = [kind for kind in _sections_at(section, place[:-1], None) if place[-1] in kind.model_fields]
    return [
        value
        for kind in kinds
        for values in _fixed(kind).values()
        for value in values
        if value in _extra(kind.model_fields[str(place[-1])]).get("kinds", values)
    ]


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _path(*parts: int | str) -> str:
    return ".".join(str(part) for part in parts if part != "")


def _described(fault: Any, meant: str | None, kinds_with: Sequence[str]) -> tuple[str, str]:
    """Returns what is wrong with the key of ``fault``, and what is said of several such keys; '' where nothing is."""
    found = fault.get("input")
    if fault["type"] == "missing":
        return "missing; add it", "are missing; add them"
    if fault["type"] == "extra_forbidden":
        if meant:
            return f"unknown key; did you mean `{meant}`?", ""
        if kinds_with:
            owners = _and(kinds_with)
            return f"unknown key; it is a key of {owners}, remove it", f"are keys of {owners}; remove them"
        return "unknown key; remove it or mend its spelling", "are unknown keys; remove them or mend their spelling"
    if fault["type"] in ("model_type", "model_attributes_type"):
        return f"keys with values are needed here, found {_short(found)}", ""
    if fault["type"] == "union_tag_not_found":
        return "missing; add it", ""
    if fault["type"] == "union_tag_invalid":
        return f"input should be one of {fault['ctx']['expected_tags']}, found '{fault['ctx']['tag']}'", ""
    # Files know lists alone.
    message = fault["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
    if fault["type"] == "value_error":
        return message, ""
    return f"{message[0].lower()}{message[1:]}, found {_short(found)}", ""


def _and(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _short(found: object) -> str:
    written = repr(found)
    return written if len(written) <= _LONGEST_FOUND else written[:_LONGEST_FOUND] + "…"
