"""YAML whose scalars stay text: the field that a value is for, not the look of it, decides its type.

PyYAML reads the file. Its guesses about scalars (``no`` is false, ``012`` is ten) are switched off; PyYAML is imported
where something is read, so that the settings themselves need the standard library alone.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from robust_moe.settings.errors import ConfigError

__all__ = ["Plain", "Written", "read_list", "read_yaml"]


class Plain(str):
    """Text without quotes, whose meaning depends on the field that it is for. Quoted text is a ``str``."""

    __slots__ = ()


class Written(dict[str, Any]):
    """A section in braces, and the ``text`` that it was read from: for a field of text it is that text."""

    def __init__(self, section: dict[str, Any], text: str) -> None:
        super().__init__(section)
        self.text = text


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # no scalar is anything but text
        yaml_constructors: ClassVar[dict[Any, Any]] = {None: yaml.SafeLoader.construct_undefined}  # nor by a tag

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
            seen = [key.value for key, _ in node.value]
            twice = next((key for place, key in enumerate(seen) if key in seen[:place]), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
            return super().construct_mapping(node, deep)

    def scalar(loader: Any, node: Any) -> str:
        if node.style is not None:
            return str(node.value)
        return Plain("null" if node.value == "~" else node.value)  # as YAML has it; in an override ~ is the home folder

    Loader.add_constructor("tag:yaml.org,2002:str", scalar)
    # whole before its parent: so a list or section that holds itself is refused
    Loader.add_constructor("tag:yaml.org,2002:seq", lambda loader, node: loader.construct_sequence(node, deep=True))
    Loader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node, deep=True))
    return Loader


def read_yaml(text: str, key: str) -> Any:
    """Nested dicts and lists of :class:`Plain` and quoted text. Raises :class:`ConfigError` where ``text``, which
    ``key`` names in the message, is no YAML."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        shown = " ".join(str(error).split())
        raise ConfigError(f"{key}: {text if len(text) < 80 else 'the text'!r} is not readable YAML: {shown}") from error


def read_list(text: str, key: str) -> Any:
    """Likewise of a field that is a list, whose brackets may be missing: ``a,b`` is ``[a,b]``, and a shell may take
    brackets for a pattern of files."""
    value = read_yaml(text, key)
    null = isinstance(value, Plain) and value.lower() == "null"  # no item of that name
    return read_yaml(f"[{text}]", key) if isinstance(value, str) and not null else value
