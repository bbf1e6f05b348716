"""What every section of ``params.yaml`` has in common, and how one is read.

A section is a frozen pydantic model that refuses unknown keys and converts nothing. A field marked :func:`operational`
decides how a stage works but not what it writes (how often it checkpoints, how many threads read): DVC does not depend
on it and it is no part of a version's identity. Every other field is named in ``dvc.yaml``; a test keeps them in step.
"""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tasks import paths
from tasks.errors import BadParameter


class Section(BaseModel):
    """A part of ``params.yaml``."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """The fields that decide what the stage writes, as plain values."""
        whole = self.model_dump(mode="json")
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
        content = YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError:
        raise BadParameter(f"{path}: no such file. Run this in the project's folder, where {path.name} lies.") from None
    except OSError as error:
        raise BadParameter(f"{path}: cannot be read ({error.strerror}). It has to be a text file.") from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise BadParameter(f"{path}: {line}this is not YAML ({error.problem}). Mend that line.") from None
    except (YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise BadParameter(f"{path}: this is not YAML in UTF-8 ({reason}). Mend that place.") from None
    if not isinstance(content, dict):
        raise BadParameter(f"{path}: expected sections (collect:, ingest:, ...), found {type(content).__name__}.")
    return content


def validate(section: type[SectionType], content: object, path: Path, prefix: str = "") -> SectionType:
    """Returns ``content`` as a ``section``; each fault becomes 'file: key: what is wrong', joined by '; '."""
    try:
        return section.model_validate(content)
    except ValidationError as error:
        faults = [_describe(fault, prefix) for fault in error.errors()]
        raise BadParameter(f"{path}: " + "; ".join(faults)) from None


def _describe(fault: Any, prefix: str) -> str:
    where = ".".join(str(part) for part in (prefix, *fault["loc"]) if part != "")
    found = fault.get("input")
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key; remove it or mend its spelling"
    if fault["type"] == "missing":
        return f"{where}: missing; add it"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, found {found!r}"
