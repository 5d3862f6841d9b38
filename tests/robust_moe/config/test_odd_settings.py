"""Settings from anyone: every key of the schema, whatever is given, is refused in one sentence or holds what was typed.

The keys come from the schema itself, so that a new one is covered as it is.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from robust_moe.config import ConfigError, TrainConfig, config_from_dict, flatten, load_config, yaml_text
from robust_moe.settings import Config, Layer, Plain, field_types, resolve

TEXTS = (
    *("", "null", "~", "???", "true", "nan", "1e400", "-1e400", "1e999999999", "1e-999999999", "1/0", "1e300/1e-300"),
    *("-1", "0", "2.5", str(2**63), str(2**64), "9" * 5000, "a" * 10**5, "0123456", "1e5", "2026-01-01", "/a/b"),
    *(
        "[]",
        "[[1]]",
        "[1, 2",
        "{}",
        "{a: 1}",
        "{a",
        "'",
        "*a",
        "&a [*a]",
        "[" * 300,
        "${oc.env:HOME}",
        "a\0b",
        "\udcff",
    ),
    *("[!!bool maybe]", "[!!timestamp x]", "[!!int '']", "{a: !!python/name:os.system ''}", "{a: !!bool x}"),
)
SELF: list[Any] = []
SELF.append(SELF)
VALUES = (
    *(None, True, [], [[1]], {}, {"a": 1}, {1: 2}, {"name": [1]}, {"name": None}, "", "???", "${oc.env:HOME}"),
    *(float("inf"), float("nan"), 1e308, 1 + 1j, -1, 2**64, 2**20000, [2**64], [float("nan")], ["a\0"], [1] * 2000),
    *(datetime.date(2026, 1, 1), b"x", object(), {1}, SELF, "a" * 10**5),
)


def settings_of(cls: type[Config], seen: set[Any]) -> Iterator[tuple[type[Config], str]]:
    """A component and a setting of it, for every setting of every component; inherited ones once."""
    seen.add(cls)
    for name, kind in field_types(cls).items():
        declared = next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))
        if (declared, name) in seen:
            continue
        seen.add((declared, name))
        yield cls, name
        for one in (kind, *get_args(kind)):
            if isinstance(one, type) and issubclass(one, Config):
                for each in [one] if one.table is None else one.table.values():
                    if issubclass(each, one) and each not in seen:
                        yield from settings_of(each, seen)


SETTINGS = list(settings_of(TrainConfig, set()))


@pytest.mark.parametrize(("cls", "name"), SETTINGS, ids=lambda part: getattr(part, "__qualname__", part))
def test_anything_is_refused_in_a_sentence_or_taken(cls: type[Config], name: str):
    for value in (*map(Plain, TEXTS), *VALUES):
        try:
            made = resolve(cls, [Layer({name: value}, "file")]).config
        except ConfigError as error:
            assert name in str(error)  # the key; what was expected and came are each kind's own
            assert len(str(error)) < 1500
        else:
            yaml.safe_dump(flatten(made)).encode()


def test_the_schema_is_looked_at_whole():
    assert len(SETTINGS) > 120
    assert {(TrainConfig, "run"), (TrainConfig, "data")} <= set(SETTINGS)


AS_TYPED = (
    *("20260101_101500", "007", "0123456", "1e3", "1e5", "0x10", "-1", "on", "no", "null", "1:30", "2026-01-01"),
    *("exp #2", "a: b", "[a]", "{a}", "{a: 1}", "{a", "{}", "${oc.env:HOME}", "???", "é", " a "),
)


@pytest.mark.parametrize("text", AS_TYPED)
def test_a_text_arrives_as_it_was_typed(text: str):
    assert load_config(None, [f"run.out={text}"]).run.out == text
    config = load_config(None, ["run.out={b}", f"run.out={text}", "data=cifar10", f"data.root={text}"])
    assert (config.run.out, config.data.root) == (text, None if text == "null" else text)
    assert config_from_dict(yaml.safe_load(yaml_text(config))) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.seed=18446744073709551616", r"^run\.seed: expected a whole number of at most 64 bits, got '1844674"),
        ("run.threads=1000000", r"^run\.threads: expected a whole number in \[1, 1024\], got 1000000"),
        ("run.devices=1000000", r"^run\.devices: expected a whole number in \[1, 256\], got 1000000"),
        ("run.batch_size=10000000000", r"^run\.batch_size: expected .* of images in \[1, 65536\], got 10000000000"),
        ("eval.batch_size=10000000000", r"^eval\.batch_size: expected .* of images in \[1, 65536\], got 10000000000"),
        ("data.image_size=1000000", r"^data\.image_size: expected .* of pixels in \[1, 4096\], got 1000000"),
        ("model.width=1000000", r"^model\.width: expected a whole number in \[1, 16384\], got 1000000"),
        ("model.blocks=[1000000]", r"^model\.blocks\[0\]: expected a whole number in \[1, 256\], got 1000000"),
        ("model.blocks=[[1]]", r"^model\.blocks\[0\]: expected a whole number, got \['1'\]"),
        ("model.moe.num_experts=1000000", r"^model\.moe\.num_experts: expected .* in \[1, 1024\], got 1000000"),
        ("eval.attack.steps=1000000000", r"^eval\.attack\.steps: expected .* in \[0, 1000000\], got 1000000000"),
        ("eval.attack.restarts=1000000", r"^eval\.attack\.restarts: expected .* in \[1, 10000\], got 1000000"),
        ("eval.attack.eot_iter=1000000000", r"^eval\.attack\.eot_iter: expected .* in \[1, 1000000\], got 1000000000"),
        ("run.epochs=???", r"^run\.epochs: expected a whole number, got '\?\?\?'"),
        ("run.epochs=${oc.env:HOME}", r"^run\.epochs: expected a whole number, got '\$\{oc\.env:HOME\}'"),
        ("run.out=", r"^run\.out: expected a name, got ''$"),
        ("run.out=a\0b", r"^run\.out: expected a path, .* got 'a\\x00b'"),
        ("run.out=" + "a" * 256, r"^run\.out: expected a path, its names of at most 255 bytes, got 'aaa"),
        ("run.imports=[os, !!python/name:os.system '']", r"run\.imports: .*not readable YAML: could not determine"),
        ("model={dual: &a {standard: *a}}", r"model: .*not readable YAML: found unconstructable recursive node"),
        ("eval.attack.eps=1e999999999", r"^eval\.attack\.eps: expected a number or a fraction .*, got '1e999999999'"),
        ("a" * 10**5 + "=1", r"^override: unknown key 'aaa.*\.\.\..*aaa'"),
    ],
)
def test_a_setting_beyond_bounds_is_named(override: str, words: str):
    with pytest.raises(ConfigError, match=words) as error:
        load_config(None, [override])
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("source", ["a" * 10**5, "a\0b", "", "/", "../presets/digits-blockmoe"])
def test_what_is_no_file_is_no_configuration(source: str):
    with pytest.raises(ConfigError, match="config: expected a YAML file or one of") as error:
        load_config(source)
    assert len(str(error.value)) < 1500


def test_a_file_of_a_megabyte_is_not_read(tmp_path: Path):
    (tmp_path / "large.yaml").write_text("a: " + "b" * 2**20)
    with pytest.raises(ConfigError, match=r"config: expected .* of at most 1,048,576 bytes, got .*large\.yaml"):
        load_config(tmp_path / "large.yaml")
