"""From the settings of `config.py` to command-line flags, environment variables and YAML.

Precedence: flag, then environment (`OUTPACE_MAX_NUM_SEQS`), then the YAML file of `--config` (or
`OUTPACE_CONFIG`), then the default. A variable `OUTPACE_…` that names no setting is an error, so that a
misspelt one is not silently without effect; those that Kubernetes makes for a Service called "outpace"
are let pass. An empty variable counts as not set.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from outpace.config import EngineConfig, ServerConfig, flag
from outpace.errors import ConfigError

Config = TypeVar("Config", EngineConfig, ServerConfig)

ENV_PREFIX = "OUTPACE_"
_NOT_SETTINGS = frozenset({"OUTPACE_CACHE", "OUTPACE_CONFIG"})
_KUBERNETES = re.compile(r"OUTPACE_(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP|SCTP))(_\w+)?")
_EVERY_CONFIG = (EngineConfig, ServerConfig)

_INTEGER = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)(k|m|g|t|[KMGT]i?)?")
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_WORDS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}

_ACCEPTED: dict[Any, str] = {
    list[int]: "integers with spaces or commas between them",
    int: "an integer, also as 64k (thousand) or 2G, 2Gi (binary)",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict[str, Any]: "a JSON object",
}


def add_flags(
    parser: argparse.ArgumentParser, configs: Iterable[type[Any]], model_positional: bool = True
) -> None:
    """Adds `--config` and one flag per setting; what is not given stays out of the namespace.

    Args:
        parser: The subcommand's parser.
        configs: Dataclasses of settings, one group in the help each.
        model_positional: Whether positional settings are also accepted without their flag.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, named as the flags are")
    for config in configs:
        group = parser.add_argument_group((config.__doc__ or config.__name__).split(".")[0])
        for field in dataclasses.fields(config):
            default = "" if field.default is None else f" (default: {_show(field.default)})"
            text = (field.metadata["help"] + default).replace("%", "%%")
            options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
            kind, _ = _kind(config, field.name)
            if kind is bool:
                group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **options)
                continue
            options["metavar"] = _metavar(kind)
            if kind == list[int]:
                options["nargs"] = "+"
            if field.metadata["positional"] and model_positional:
                name = field.name.upper()
                positional = {**options, "dest": f"positional_{field.name}", "metavar": name}
                parser.add_argument(nargs="?", **positional)
                options["help"] = f"The same as {name}"
            group.add_argument(flag(field.name), **options)


def load(config: type[Config], flags: Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    """Builds a config from flags, environment, YAML and defaults, in this order of precedence.

    Args:
        config: The dataclass to build.
        flags: The parsed namespace: those that were given, raw; keys that are no setting are left alone.
        environ: The environment.

    Raises:
        ConfigError: A value is malformed or out of range, or a name is unknown.
    """
    environ = {name: text for name, text in environ.items() if not _is_from_kubernetes(name, text)}
    _refuse_unknown_variables(environ)
    path = flags.get("config") or environ.get("OUTPACE_CONFIG")
    from_file = read_yaml(Path(path)) if path else {}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, variable = field.name, ENV_PREFIX + field.name.upper()
        if (given := _given(name, flags)) is not None:
            values[name] = _parse_text(config, name, given, flag(name))
        elif text := environ.get(variable):
            values[name] = _parse_text(config, name, text, f"{variable} in the environment")
        elif name in from_file:
            values[name] = _parse_yaml(config, name, from_file[name], f"{name} in {path}")
    return config(**values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by field name.

    Raises:
        ConfigError: The file cannot be read, is no mapping, or has a key that is no setting or comes twice.
    """
    import yaml  # not at the top: `outpace --help` is quick

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --config {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a mapping of settings, not a {type(content).__name__}")
    known = _known_names()
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"unknown setting {key!r} in {path}{_hint(name, known)}")
        if name in settings:
            raise ConfigError(f"{name} is twice in {path}, with - and with _")
        settings[name] = value
    return settings


def parse_value(kind: Any, text: str, source: str) -> Any:
    """Reads a flag's or variable's text as int, float, bool, str, ints, JSON object or a Literal's string.

    Raises:
        ConfigError: It is none; the message names `source`, the value and what is accepted.
    """
    value: Any = None
    if kind is str:
        value = text
    elif kind is int:
        value = _parse_int(text.strip())
    elif kind is bool:
        value = _WORDS.get(text.strip().lower())
    elif kind is float:
        try:
            value = float(text)
        except ValueError:
            value = None
    elif kind == dict[str, Any]:
        value = _parse_object(text)
    elif kind == list[int]:
        value = _parse_ints(text)
    elif text in typing.get_args(kind):
        value = text
    if value is None:
        raise _malformed(kind, text, source)
    return value


def _given(name: str, flags: Mapping[str, Any]) -> Any:
    """The value of a flag or of its positional form, or None."""
    by_flag, by_place = flags.get(name), flags.get(f"positional_{name}")
    if by_flag is not None and by_place is not None and by_flag != by_place:
        raise ConfigError(f"{name} is given twice: {by_place!r} and {flag(name)} {by_flag!r}")
    return by_place if by_flag is None else by_flag


def _parse_text(config: type[Any], name: str, value: Any, source: str) -> Any:
    """A flag's or variable's value; argparse has already made bools of switches, and lists of lists."""
    if isinstance(value, bool):
        return value
    text = " ".join(value) if isinstance(value, list) else value
    return parse_value(_kind(config, name)[0], text, source)


def _parse_yaml(config: type[Any], name: str, value: Any, source: str) -> Any:
    """A YAML value, which has a type of its own; integers may be written as in flags ("2G")."""
    kind, optional = _kind(config, name)
    if value is None and optional:
        return None
    if kind is int and isinstance(value, str):
        return parse_value(int, value, source)
    if typing.get_origin(kind) is Literal:
        fits = value in typing.get_args(kind)
    else:
        fits = type(value) is (typing.get_origin(kind) or kind)
    if fits and kind == list[int]:
        fits = all(type(item) is int for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if not fits:
        raise _malformed(kind, value, source)
    return value


def _parse_int(text: str) -> int | None:
    """An integer with an optional suffix as vLLM reads them: k = 1000, K = Ki = 1024; None if it is none."""
    match = _INTEGER.fullmatch(text)
    if match is None or len(text) > 64:
        return None
    number, suffix = match.groups()
    if suffix in _DECIMAL:
        return round(float(number) * _DECIMAL[suffix])
    if "." in number:
        return None
    return int(number) * (_BINARY[suffix[0]] if suffix else 1)


def _parse_ints(text: str) -> list[int] | None:
    """Integers with spaces or commas between them; None if a part is none."""
    numbers = [_parse_int(part) for part in text.replace(",", " ").split()]
    return None if None in numbers else [number for number in numbers if number is not None]


def _parse_object(text: str) -> dict[str, Any] | None:
    """A JSON object; None if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _kind(config: type[Any], name: str) -> tuple[Any, bool]:
    """A setting's type without its None, and whether None was allowed."""
    hint = typing.get_type_hints(config)[name]
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    (kind,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    return kind, True


def _malformed(kind: Any, value: Any, source: str) -> ConfigError:
    accepted = _ACCEPTED.get(kind) or "one of " + ", ".join(typing.get_args(kind))
    return ConfigError(f"{source} must be {accepted}, got {value!r}")


def _is_from_kubernetes(variable: str, text: str) -> bool:
    """Whether Kubernetes set it for a Service called "outpace", as it does OUTPACE_PORT to tcp://10.0.0.1:80."""
    is_address = variable == "OUTPACE_PORT" and "://" in text
    return is_address or _KUBERNETES.fullmatch(variable) is not None


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = {ENV_PREFIX + name.upper() for name in _known_names()} | _NOT_SETTINGS
    for variable in environ:
        if variable.startswith(ENV_PREFIX) and variable not in known:
            raise ConfigError(f"the environment variable {variable} names no setting{_hint(variable, known)}")


def _known_names() -> set[str]:
    return {field.name for config in _EVERY_CONFIG for field in dataclasses.fields(config)}


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    return {int: "N", float: "X", str: "NAME", dict[str, Any]: "JSON", list[int]: "N"}[kind]


def _show(default: Any) -> str:
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)
