"""Parts that are chosen by name: a file in the right package is all it takes to add one."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from outpace.errors import ConfigError


def available(package: str) -> list[str]:
    """The modules of a package that can be chosen, by name: those with a function `create`."""
    names = [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    return sorted(name for name in names if hasattr(importlib.import_module(f"{package}.{name}"), "create"))


def find(package: str, name: str, setting: str) -> ModuleType:
    """The module that makes the part called `name`.

    Args:
        package: Where the built-in ones are.
        name: A module of `package`, or the dotted path of a module from outside.
        setting: The flag or argument that chose it, for errors.

    Raises:
        ConfigError: There is no such module, or it has no `create`.
    """
    is_dotted = "." in name
    if not is_dotted and name not in (known := available(package)):
        choices = ", ".join(known)
        raise ConfigError(f"{setting} must be one of {choices} or the dotted path of a module, got {name!r}")
    try:
        module = importlib.import_module(name if is_dotted else f"{package}.{name}")
    except Exception as error:  # a module from outside may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{setting} {name} cannot be imported: {reason}") from error
    if not hasattr(module, "create"):
        raise ConfigError(f"{setting} {name} has no function create()")
    return module


def build(package: str, name: str, interface: type[Any], setting: str, *arguments: Any) -> Any:
    """Builds the part called `name` with its module's `create(*arguments)`.

    Args:
        package: Where the built-in ones are.
        name: A module of `package`, or the dotted path of a module from outside.
        interface: What it must be an instance of.
        setting: The flag or argument that chose it, for errors.
        *arguments: What `create` is given.

    Raises:
        ConfigError: There is no such module, or it does not make such a part.
    """
    part = find(package, name, setting).create(*arguments)
    if not isinstance(part, interface):
        made = type(part).__name__
        raise ConfigError(f"{setting} {name}: create() made a {made}, not a {interface.__name__}")
    return part
