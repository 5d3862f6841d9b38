"""Settings without any component of the package: types, ranges, tables, layers."""

from __future__ import annotations

import copy
import pickle
import string
from dataclasses import FrozenInstanceError, dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from robust_moe.settings import Config as Settings
from robust_moe.settings import (
    ConfigError,
    Layer,
    Plain,
    Table,
    fixed,
    plain,
    read_yaml,
    replaced,
    resolve,
    setting,
)

TOOLS = Table("tool")
# text of which YAML would make something else
GUESSED = "null no 012 1_0 1e3 2026-01-01 ~ 0x1F [a] {a} = << 1:30 .inf ! & - ?"


class Tool:
    @dataclass(frozen=True, kw_only=True)
    class Config(Settings):
        table: ClassVar[Table] = TOOLS
        length: Fraction = setting("1/3", "from end to end", at_least=0)


@TOOLS.register("hammer")
class Hammer(Tool):
    @dataclass(frozen=True, kw_only=True)
    class Config(Tool.Config):
        weight: float = setting(1.5, "of the head", unit="kg", above=0)


@TOOLS.register("saw")
class Saw(Tool):
    @dataclass(frozen=True, kw_only=True)
    class Config(Tool.Config):
        teeth: int = setting(20, "in all", at_least=1)
        kind: Literal["rip", "cross"] = setting("rip", "of cut")

        def check(self) -> None:
            if self.kind == "cross" and self.teeth < 10:
                raise ConfigError(f"teeth: expected at least 10 to cut across, got {self.teeth}")


@dataclass(frozen=True, kw_only=True)
class Box(Settings):
    tool: Tool.Config = setting(Hammer.Config(weight=2), "the one inside")
    label: str = setting("", "on the lid")
    place: str | None = setting(None, "where it stands", path=True)
    sizes: tuple[float, ...] = setting((), "of nails", unit="mm", above=0)
    locked: bool = setting(False, "whether it is locked")
    mode: Literal["auto", True, False] = setting("auto", "how it opens")
    limit: int | None = setting(None, "of tools", at_least=1)


def box(*trees: Any) -> Box:
    return resolve(Box, [Layer(tree, f"layer {place}") for place, tree in enumerate(trees)]).config


def test_a_value_is_typed_and_checked_where_it_is_made():
    assert Hammer.Config(length="1/2", weight=3).values() == {"length": Fraction(1, 2), "weight": 3.0}
    with pytest.raises(ConfigError, match=r"^weight: expected a number of kg > 0, got 0\.0$"):
        Hammer.Config(weight=0)
    with pytest.raises(ConfigError, match=r"^teeth: expected at least 10 to cut across, got 9$"):
        replace(Saw.Config(teeth=9), kind="cross")
    with pytest.raises(FrozenInstanceError):
        Hammer.Config().weight = 2
    with pytest.raises(ConfigError, match=r"^tool: expected a Tool\.Config, got a Box$"):
        Box(tool=Box())


def test_a_name_chooses_the_component_and_its_defaults():
    assert box({"tool": {"name": "saw"}}).tool == Saw.Config()
    assert box({"tool": Plain("saw")}).tool == Saw.Config()  # the bare name
    assert box({"tool": {"length": Plain("2")}}).tool == Hammer.Config(weight=2, length=2)  # the section's own default
    assert Saw.Config().name == "saw"
    assert TOOLS["saw"].owner is Saw


def test_another_name_keeps_what_both_inherit():
    first = {"tool": {"name": "hammer", "length": "3/4", "weight": 9.0}}
    assert box(first, {"tool": {"name": "saw"}}).tool == Saw.Config(length="3/4")
    assert box(first, {"tool": {"name": "hammer"}}).tool == Hammer.Config(length="3/4", weight=9)
    back = box(first, {"tool": {"name": "saw"}}, {"tool": {"name": "hammer"}}).tool
    assert back == Hammer.Config(length="3/4")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"tool": {"name": "sow"}}, ["tool.name", "hammer, saw", "did you mean 'saw'"]),
        ({"tool": {"teeth": "3"}}, ["unknown key 'tool.teeth' of tool 'hammer'"]),  # of another member
        ({"tool": {"name": "saw", "tooth": "3"}}, ["'tool.tooth' of tool 'saw'", "did you mean 'tool.teeth'"]),
        ({"weight": Plain("3")}, ["unknown key 'weight'", "did you mean 'tool.weight'"]),  # the section forgotten
        ({"teeth": Plain("3")}, ["unknown key 'teeth'", "did you mean 'tool.teeth'"]),  # of another than the default
        ({"tool": {"name": "saw", "kind": Plain("rib")}}, ["tool.kind", "rip, cross", "'rib'", "did you mean 'rip'"]),
        ({"tool": None}, ["tool", "section", "None"]),
        ({"limit": Plain("1.0")}, ["limit", "whole number", "'1.0'"]),
        ({"limit": "3"}, ["limit", "whole number", "'3'"]),  # quoted: text
        ({"limit": Plain("0")}, ["limit", ">= 1", "0"]),
        ({"limit": {"x": Plain("1")}}, ["unknown key 'limit.x'", "no section"]),
        ({"locked": Plain("yes")}, ["locked", "true or false", "'yes'"]),
        ({"locked": 1}, ["locked", "true or false", "1"]),
        ({"sizes": [Plain("1"), Plain("0")]}, ["sizes[1]", "mm > 0"]),
        ({"sizes": Plain("{x: 3}")}, ["sizes", "a list", "3"]),
        ({"sizes": "3"}, ["sizes", "a list", "'3'"]),  # quoted: text
        ({"sizes": Plain("null")}, ["sizes: expected a list, got 'null'"]),  # not of one item
        ({"sizes": Plain("~")}, ["sizes: expected a list, got 'null'"]),
        ({"sizes": Plain("3,x")}, ["sizes[1]", "a decimal number", "'x'"]),
        ({"tool": {"length": Plain("1/0")}}, ["tool.length", "fraction", "1/0"]),
        ({"tool": {"length": Plain("1/2/3")}}, ["tool.length", "fraction", "1/2/3"]),
        ({"tool": {"length": Plain("0x1")}}, ["tool.length", "fraction", "0x1"]),
    ],
)
def test_bad_trees_name_key_expected_and_got(tree: Any, words: list[str]):
    with pytest.raises(ConfigError) as error:
        box(tree)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("text", ["0x10", "1_000", "0o7", "1e400", "nan", "-inf", "١٢", "1,5", "", " 1", "1e", "--1"])
def test_numbers_are_decimal_or_refused(text: str):
    with pytest.raises(ConfigError, match=r"^sizes\[0\]: expected"):
        box({"sizes": [Plain(text)]})


@pytest.mark.parametrize(("text", "value"), [("007", 7.0), ("1e-3", 1e-3), (".5", 0.5), ("2.", 2.0), ("+3", 3.0)])
def test_decimal_numbers(text: str, value: float):
    assert box({"sizes": [Plain(text)]}).sizes == (value,)


@pytest.mark.parametrize(
    ("text", "values"), [("3", (3.0,)), ("3,4", (3.0, 4.0)), ("3, 4", (3.0, 4.0)), ("[3]", (3.0,)), ("[]", ())]
)
def test_a_list_may_be_written_without_brackets(text: str, values: tuple[float, ...]):
    assert box({"sizes": Plain(text)}).sizes == values


def test_a_literal_may_mix_text_and_truth_values():
    assert [box({"mode": Plain(text)}).mode for text in ("auto", "true", "False")] == ["auto", True, False]
    with pytest.raises(ConfigError, match="mode: expected one of auto, true, false, got 1"):
        box({"mode": 1})


@hypothesis_settings(deadline=None)
@given(st.text())
def test_text_arrives_as_it_was_typed(text: str):
    assert box({"label": Plain(text)}).label == text
    assert box(read_yaml(yaml.safe_dump({"label": text}), "test")).label == text


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "no",
        "012",
        "1_0",
        "1e3",
        "2026-01-01",
        "~",
        "0x1F",
        "[a]",
        "{a}",
        "=",
        "<<",
        "1:30",
        ".inf",
        "!",
        "&",
        "-",
        "?",
    ],
)
def test_text_that_yaml_would_guess_about(text: str):
    assert box({"label": Plain(text)}).label == text
    assert box(read_yaml(yaml.safe_dump(plain(Box(label=text))), "test")).label == text


def test_a_path_begins_at_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/of")
    assert box({"place": Plain("~/runs")}).place == "/home/of/runs"
    assert box({"place": Plain("~")}).place == "/home/of"
    assert box({"place": Plain("a~b")}).place == "a~b"
    assert box({"place": Plain("null")}).place is None
    assert box({"place": "null"}).place == "null"  # quoted


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.builds(
        Box,
        tool=st.one_of(
            st.builds(Hammer.Config, length=st.fractions(0, 9), weight=st.floats(1e-3, 1e3)),
            st.builds(
                Saw.Config, length=st.fractions(0, 9), teeth=st.integers(10, 99), kind=st.sampled_from(["rip", "cross"])
            ),
        ),
        label=st.text(string.printable),
        sizes=st.lists(st.floats(1e-9, 1e9)),
        locked=st.booleans(),
        mode=st.sampled_from(["auto", True, False]),
        limit=st.one_of(st.none(), st.integers(1, 10**9)),
    )
)
def test_what_is_written_is_read_back_equal(made: Box):
    text = yaml.safe_dump(plain(made), sort_keys=False)
    assert box(read_yaml(text, "test")) == made
    assert box(plain(made)) == made


@dataclass(frozen=True, kw_only=True)
class Pair(Settings):
    other: Tool.Config | None = setting(None, "a second tool; without a name one like the first")


@dataclass(frozen=True, kw_only=True)
class Blade(Tool.Config):
    pair: Pair = setting(Pair(), "what it comes with")


@dataclass(frozen=True, kw_only=True)
class AxeConfig(Blade):
    edge: float = setting(3.0, "of the blade", unit="mm", above=0)


@TOOLS.register("axe", AxeConfig)
def axe() -> None:
    """A component that is a function."""


def pair(*trees: Any) -> AxeConfig:
    layers = [Layer(tree, f"layer {place}") for place, tree in enumerate(trees)]
    return resolve(Box, [Layer({"tool": tree}, where) for tree, where in layers]).config.tool


def test_an_optional_section_without_a_name_is_like_the_one_around_it():
    assert pair("axe").pair.other is None
    wide = {"name": "axe", "edge": Plain("7"), "length": Plain("2")}
    like = pair({"pair": {"other": {"length": "5"}}, **wide}).pair.other
    assert like == AxeConfig(edge=7, length=5)
    assert pair(wide, {"pair": {"other": {}}}).pair.other == AxeConfig(edge=7)  # but not what every tool has
    assert pair(wide, {"pair": {"other": {"edge": 1.0}}}).pair.other == AxeConfig(edge=1)
    assert pair(wide, {"pair": {"other": "saw"}}).pair.other == Saw.Config()
    assert pair(wide, {"pair": {"other": "axe"}}).pair.other == AxeConfig()  # named: with defaults of its own
    renamed = pair(wide, {"pair": {"other": {"edge": 1, "length": 5}}}, {"pair": {"other": "saw"}})
    assert renamed.pair.other == Saw.Config(length=5)
    made = pair(wide, {"pair": {"other": {"name": "saw", "teeth": 30}}})
    assert pair(plain(made)) == made
    assert pair(plain(made), {"pair": {"other": {"teeth": Plain("40")}}}).pair.other == Saw.Config(teeth=40)
    assert pair(plain(made), {"pair": {"other": Plain("null")}}).pair.other is None
    assert pair(plain(made), {"pair": {"other": None}}, {"pair": {"other": {}}}).pair.other == AxeConfig(edge=7)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"name": "axe", "pair": {"other": {"tooth": 3}}}, "'tool.pair.other.tooth' of tool 'axe'"),
        ({"name": "axe", "pair": {"other": {"teeth": 3}}}, "'tool.pair.other.teeth' of tool 'axe'"),
        ({"name": "axe", "pair": {"other": {"edge": 0}}}, "tool.pair.other.edge: expected a number of mm > 0"),
        ({"name": "axe", "edge": 0, "pair": {"other": {}}}, "^tool.edge: expected a number of mm > 0"),
        ({"name": "axe", "pair": {"other": "sow"}}, "tool.pair.other.name: .* did you mean 'saw'"),
        ({"name": "axe", "pair": {"other": 3}}, "tool.pair.other: expected a section"),
    ],
)
def test_bad_optional_sections_name_key_expected_and_got(tree: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        pair(tree)


def test_an_optional_section_with_nothing_around_it_needs_a_name():
    assert resolve(Pair, [Layer({"other": {"name": "saw"}}, "test")]).config.other == Saw.Config()
    with pytest.raises(ConfigError, match=r"^other\.name: expected 'axe' or 'hammer' or 'saw', got none"):
        resolve(Pair, [Layer({"other": {"length": "2"}}, "test")])
    with pytest.raises(ConfigError, match=r"other: expected a .*Config"):
        Pair(other=Box())


def test_what_a_component_is_called_with():
    assert Saw.Config(teeth=9).own_arguments(Tool.Config) == {"teeth": 9, "kind": "rip"}
    named = fixed(Saw.Config, handle="long")(length=3)
    assert named.own_arguments(Tool.Config) == {"handle": "long", "teeth": 20, "kind": "rip"}


def test_where_a_setting_comes_from():
    found = resolve(
        Box, [Layer({"tool": {"weight": 3.0}, "label": "a"}, "file"), Layer({"tool": {"weight": 4.0}}, "override")]
    )
    assert found.config.tool.weight == 4
    assert found.origins["tool.weight"] == "override"
    assert found.origins["label"] == "file"
    named = resolve(Box, [Layer({"tool": Plain("saw")}, "file"), Layer({"tool": {"teeth": 30}}, "override")]).origins
    assert named == {"tool.name": "file", "tool.teeth": "override"}
    assert "tool.length" not in found.origins


def test_a_table_refuses_a_taken_name():
    with pytest.raises(ConfigError, match=r"tool 'saw': expected a name that is free, got one that .*Saw has"):
        TOOLS.register("saw")(Hammer)


def test_one_component_may_have_several_names():
    table = Table("tool")
    table.register("a")(Hammer)
    table.register("b", fixed(Hammer.Config, handle="long"))(Hammer)
    assert (table["a"].name, table["b"].name, Hammer.Config.name) == ("a", "b", "hammer")
    assert (dict(table["a"].fixed), dict(table["b"].fixed)) == ({}, {"handle": "long"})
    assert table["b"].owner is Hammer


def test_a_component_without_settings_of_its_own_has_those_it_inherits():
    table = Table("tool")
    table.register("plane")(type("Plane", (Tool,), {}))
    table.register("heavy plane")(type("HeavyPlane", (table["plane"].owner,), {}))
    for name in table:
        made = table[name](length="1/2")
        assert (made.name, made.owner.Config, made.values()) == (name, table[name], {"length": Fraction(1, 2)})
    assert (Tool.Config.name, Tool.Config.owner) == ("", None)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_and_pickles_are_equal(again: Any):
    from robust_moe.config import load_config, preset_names

    for made in (Box(tool=Saw.Config(teeth=11)), *(load_config(preset) for preset in preset_names())):
        assert again(made) == made
        assert type(again(made)) is type(made)
    assert type(again(load_config(None, ["eval.attack=apgd-t"]).eval.attack)).name == "apgd-t"


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(ConfigError, match="the key 'a' stands twice"):
        read_yaml("a: 1\na: 2", "file")


def test_replaced_checks_anew():
    assert replaced(Box(), "tool.weight", 5).tool.weight == 5
    with pytest.raises(ConfigError, match="weight"):
        replaced(Box(), "tool.weight", -5)
