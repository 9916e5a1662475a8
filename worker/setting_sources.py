"""The sources of the settings' values: options, environment variables, and files that variables name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import AliasGenerator, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from worker import network
from worker.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails


class SecretFileSource(PydanticBaseSettingsSource):
    """A source that reads values from files: `NAME_FILE` names the file that contains the value of `NAME`."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the content of the field's file, or None if no file is named or the variable itself is set."""
        name = str(field.validation_alias or field_name)
        path = os.environ.get(f"{name}_FILE")
        if not path or os.environ.get(name):
            return None, name, False
        try:
            return Path(path).read_text(encoding="utf-8-sig").strip(), name, False
        except OSError as error:
            raise SettingsError(f"{name}_FILE: cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise SettingsError(f"{name}_FILE: {path} is not UTF-8", todo="save it as UTF-8") from None

    def __call__(self) -> dict[str, Any]:
        """Return the values of all `_FILE` variables that are set."""
        found = (self.get_field_value(info, name) for name, info in self.settings_cls.model_fields.items())
        return {name: value for value, name, _ in found if value is not None}


def prefixed(field_name: str) -> str:
    """Return the environment variable of a field."""
    return f"KLAVIYO_WORKER_{field_name.upper()}"


class SettingsBase(BaseSettings):
    """The base of all settings, with the sources of their values and the names of their variables."""

    uses_network: ClassVar[bool] = False  # whether `load` applies the proxy and the certificates of the environment

    model_config = SettingsConfigDict(
        alias_generator=AliasGenerator(validation_alias=prefixed),
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources in order of precedence: options, environment, files that the environment names."""
        return init_settings, env_settings, SecretFileSource(settings_cls)


S = TypeVar("S", bound=SettingsBase)


def load(kind: type[S], options: Mapping[str, Any]) -> S:
    """Return the settings of a class. `options` are values by field name, which take precedence over variables.

    Makes all libraries use the proxy and the certificate authority of the environment, if the command uses a network.
    Raises SettingsError with one line per invalid variable: its name, what was expected, what to do.
    """
    aliases = {name: str(info.validation_alias) for name, info in kind.model_fields.items()}
    given = {aliases[name]: value for name, value in options.items() if value is not None}
    problems: list[SettingsError] = []
    try:
        if kind.uses_network:
            network.configure(os.environ)
    except SettingsError as error:
        problems += error.problems
    try:
        settings = kind(**given)
    except ValidationError as errors:
        problems += [_problem(kind, error) for error in errors.errors()]
    if problems:
        raise SettingsError.joined(problems)
    return settings


def _problem(kind: type[BaseSettings], error: ErrorDetails) -> SettingsError:
    name = str(error["loc"][0])
    if error["type"] == "mistake":
        found = error["ctx"]
        return SettingsError(f"{found['name'] or name} {found['reason']}", todo=found["todo"])
    info = next(info for info in kind.model_fields.values() if info.validation_alias == name)
    if error["type"] == "missing":
        return SettingsError(f"{name} is missing", todo=f"set it (or {name}_FILE) to the {info.description}")
    problem = error["msg"].removeprefix("Value error, ")
    return SettingsError(f"{name} is malformed", todo=f"{problem} — {info.description}")
