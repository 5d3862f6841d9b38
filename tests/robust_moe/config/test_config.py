import re
from fractions import Fraction
from pathlib import Path

import pytest

from robust_moe.config import (
    ConfigError,
    TrainConfig,
    choose,
    config_from_dict,
    flatten,
    load_config,
    parse_fraction,
    preset_names,
    save_config,
)

CYCLIC, ONE_CYCLE, MULTISTEP = (f"optim.schedule={{name: {name}, " for name in ("cyclic", "one_cycle", "multistep"))


def test_overrides_beat_the_file_which_beats_the_defaults(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: 0.2, momentum: 0.5}\n")
    config = load_config(path, ["optim.lr=0.3", "model.moe.layers=[layer4.1]", "optim.lr=0.4"])
    assert (config.optim.lr, config.optim.momentum) == (0.4, 0.5)
    assert config.optim.weight_decay == TrainConfig().optim.weight_decay
    assert config.model.moe.layers == ("layer4.1",)
    assert load_config(path, ["optim={name: adam, lr: 0.3}", "optim.lr=0.4", "optim.eps=1e-4"]).optim.values() == {
        **load_config(None, ["optim=adam"]).optim.values(), "lr": 0.4, "eps": 1e-4
    }  # fmt: skip


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_survives_yaml_and_dict(preset: str, tmp_path: Path):
    config = load_config(preset)
    save_config(config, tmp_path / "copy.yaml")
    assert load_config(tmp_path / "copy.yaml") == config
    nested: dict = {}
    for key, value in flatten(config).items():
        node = nested
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    assert config_from_dict(nested) == config
    assert config != TrainConfig()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["unknown key 'optim.lrr'", "did you mean 'optim.lr'"]),  # a slip of the finger
        ("lr=1", ["unknown key 'lr'", "optim.lr"]),  # the section forgotten
        ("optim.lr.x=1", ["unknown key 'optim.lr.x'"]),  # below a leaf
        ("model=3", ["model.name", "resnet_small", "3"]),  # a value for a section
        ("model.moe=null", ["model.moe", "section", "null"]),
        ("optim.lr=fast", ["optim.lr", "fast"]),  # wrong type
        ("run.epochs=1.5", ["run.epochs", "1.5"]),
        ("optim.lr=-1", ["optim.lr", "> 0", "-1"]),  # out of range
        ("run.epochs=0", ["run.epochs", ">= 1", "0"]),
        ("model.moe.top_k=5", ["model.moe.top_k", "k <= 4", "5"]),  # k > E
        ("model.moe.num_experts=0", ["model.moe.num_experts", "[1, 1024]", "0"]),
        ("method.attack.eps=-1/255", ["method.attack.eps", ">= 0", "-1/255"]),
        ("method.attack.eps=8/0", ["method.attack.eps", "fraction", "8/0"]),
        ("eval.attack.norm=L1", ["eval.attack.norm", "Linf, L2", "L1"]),
        ("method.attack_mode=evil", ["method.attack_mode", "eval, train", "evil"]),
        ("method=trades method.beta=-1", ["method.beta", ">= 0", "-1"]),
        ("method=rt_er method.form=papers", ["method.form", "paper, released", "did you mean 'paper'"]),
        ("method=free_at method.replays=0", ["method.replays", ">= 1", "0"]),
        ("method.awp_gamma=-0.1", ["method.awp_gamma", ">= 0", "-0.1"]),
        (CYCLIC + "lr_min: 0.2}", ["optim.schedule.lr_min", "[0, lr = 0.1]", "0.2"]),  # above the highest
        (CYCLIC + "cycle_epochs: 0}", ["optim.schedule.cycle_epochs", ">= 0.001", "0"]),
        (CYCLIC + "cycle_epochs: 1e-320}", ["optim.schedule.cycle_epochs", ">= 0.001"]),  # NaN for a rate
        ("method.awp_warmup_epochs=0.5", ["method.awp_warmup_epochs", "0.5", "whole number"]),
        ("method.awp_warmup_epochs=-1", ["method.awp_warmup_epochs", ">= 0", "-1"]),
        ("method.awp_warmup_epochs=nan", ["method.awp_warmup_epochs", "nan", "whole number"]),
        ("method.attack.eps=8", ["method.attack.eps", "[0, 1]", "8/255", "got '8'"]),  # in 255ths
        ("eval.attack.eps=1.5", ["eval.attack.eps", "[0, 1]", "1.5"]),
        (MULTISTEP + "milestones: [0.5,0.5]}", ["optim.schedule.milestones", "strictly rising", "[0.5, 0.5]"]),
        (MULTISTEP + "milestones: []}", ["optim.schedule.milestones", "strictly rising", "[]"]),
        (MULTISTEP + "milestones: [0.7,0.5]}", ["optim.schedule.milestones", "rising", "0.7"]),
        (MULTISTEP + "milestones: [1.5]}", ["optim.schedule.milestones", "(0, 1)", "1.5"]),  # epochs for shares
        (ONE_CYCLE + "rise: 1}", ["optim.schedule.rise", "[0, 1)", "1"]),
        (ONE_CYCLE + "fall: cosin}", ["optim.schedule.fall", "linear, cosine", "did you mean 'cosine'"]),
        ("optim.rise=0.5", ["unknown key 'optim.rise' of optimiser 'sgd'", "did you mean 'optim.schedule.rise'"]),
        ("optim.schedule.rise=0.5", ["unknown key 'optim.schedule.rise' of schedule 'polynomial'"]),
        ("optim={name: adam, momentum: 0.5}", ["unknown key 'optim.momentum' of optimiser 'adam'"]),
        ("optim={name: adam, betas: [0.9]}", ["optim.betas", "two", "[0.9]"]),
        ("optim={name: adam, betas: [0.9, 1]}", ["optim.betas[1]", "[0, 1)", "1"]),
        ("optim.weight_decay_on=weight", ["optim.weight_decay_on", "all, weights", "did you mean 'weights'"]),
        ("method.label_smoothing=1", ["method.label_smoothing", "[0, 1)", "1"]),
        ("method.attack_steps_schedule=[[0,2],[0.5]]", ["method.attack_steps_schedule", "pairs", "[0.5]"]),
        ("method.attack_steps_schedule=[[0.1,2]]", ["method.attack_steps_schedule", "rising strictly from 0", "0.1"]),
        ("method.attack_steps_schedule=[[0,2],[0.4,5],[0.4,7]]", ["method.attack_steps_schedule", "strictly", "7.0"]),
        ("method.attack_steps_schedule=[[0,2],[1,7]]", ["method.attack_steps_schedule", "below 1", "1.0"]),
        ("method.attack_steps_schedule=[[0,2.5]]", ["method.attack_steps_schedule", "whole steps", "2.5"]),
        ("method.attack_steps_schedule=[[0,0]]", ["method.attack_steps_schedule", "steps >= 1", "0"]),
        ("data.augment.flip_order=alternate", ["flip_order", "random, alternating", "did you mean 'alternating'"]),
        ("run.ema_epochs=-1", ["run.ema_epochs", ">= 0", "-1"]),
        ("run.ema_decay=1", ["run.ema_decay", "[0, 1)", "1"]),
        ("model.mixture.num_experts=-1", ["model.mixture.num_experts", "[0, 1024]", "-1"]),
        ("model.mixture.routing=topk", ["model.mixture.routing", "soft, top_k, hard", "did you mean 'top_k'"]),
        ("model.mixture.mix=logit", ["model.mixture.mix", "did you mean 'logits'"]),
        ("model.dual.alpha=1.5", ["model.dual.alpha", "[0, 1]", "1.5"]),
        ("model.dual.mix=probs", ["model.dual.mix", "logits, probabilities", "probs"]),
        ("model.dual.standard=run/best.pt", ["model.dual.standard.name", "resnet_small", "run/best.pt"]),
        ("model.dual.standard.width=0", ["model.dual.standard.width", "[1, 16384]", "0"]),
        ("model.dual.standard.blocks=[0]", ["model.dual.standard.blocks", "[1, 256]", "[0]"]),
        ("eval.seed=-1", ["eval.seed", ">= 0", "-1"]),
        ("run.precision=fp8", ["run.precision", "bf16-mixed", "fp8"]),
        ("optim.momentum=0", ["optim.nesterov", "false", "momentum is 0"]),  # nesterov needs momentum
        ("optim.lr", ["key=value", "optim.lr"]),  # no value
        ("=1", ["key=value"]),
        (MULTISTEP + "milestones: [1", ["optim.schedule", "milestones", "[1", "not readable"]),  # broken YAML
    ],
)
def test_bad_overrides_name_key_expected_and_got(override: str, words: list[str]):
    with pytest.raises(ConfigError) as error:
        load_config(None, re.split(r" (?=method\.)", override))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("value", ["inf", ".inf", "-.inf", "nan", ".nan"])
@pytest.mark.parametrize(
    "key",
    [
        "model.moe.noise_std",
        "model.moe.balance.weight",
        "model.mixture.noise_std",
        "model.dual.alpha",
        "method=trades method.beta",
        "method.awp_gamma",
        "run.ema_decay",
        "run.ema_epochs",
        "method.label_smoothing",
        "optim.schedule=one_cycle optim.schedule.rise",
        "optim.schedule=cyclic optim.schedule.lr_min",
        "optim.schedule=cyclic optim.schedule.cycle_epochs",
        "optim.lr",
        "optim.momentum",
        "optim.weight_decay",
        "optim.schedule.power",
        "optim.schedule=multistep optim.schedule.factor",
        "optim=adam optim.eps",
        "optim.warmup_epochs",
        "optim.grad_clip",
        "data.validation_fraction",
        "data.augment.color_jitter",
        "eval.attack.eps",
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_name(key: str, value: str):
    *names, key = key.split()
    with pytest.raises(ConfigError, match=rf"^{key}: expected "):
        load_config(None, [*names, f"{key}={value}"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lrr: 1}", ["optim.lrr", "did you mean 'optim.lr'"]),
        ("- a\n- b", ["sections", "list"]),
        ("a: [", ["not readable YAML"]),
        ("run: 3", ["run", "section", "3"]),
    ],
)
def test_bad_files_are_named(text: str, words: list[str], tmp_path: Path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        (["routing=top_k", "top_k=4"], ["model.mixture.top_k", "k <= 3", "4"]),
        (["moe.layers=[layer4.1]"], ["model.moe.layers", "none, as mixture.num_experts > 0", "layer4.1"]),
    ],
)
def test_bad_mixtures_of_networks_name_key_expected_and_got(mixture: list[str], words: list[str]):
    """Of settings that only an enabled mixture has to obey."""
    overrides = [f"model.{item}" if item.startswith("moe.") else f"model.mixture.{item}" for item in mixture]
    load_config(None, overrides)
    with pytest.raises(ConfigError) as error:
        load_config(None, [*overrides, "model.mixture.num_experts=3"])
    for word in words:
        assert word in str(error.value)


def test_an_average_has_one_length():
    with pytest.raises(ConfigError, match=r"run.ema_epochs: expected 0 where ema_decay is set \(0.9\), got 2"):
        load_config(None, ["run.ema_decay=0.9", "run.ema_epochs=2"])


def test_a_ball_of_another_norm_may_be_larger_than_a_pixel():
    assert load_config(None, ["eval.attack.norm=L2", "eval.attack.eps=1.5"]).eval.attack.eps == Fraction("1.5")
    assert load_config(None, ["eval.attack.eps=1"]).eval.attack.eps == 1


def test_unknown_preset_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'digits-blockmoe'"):
        load_config("digits-blokmoe")


def test_choose_offers_the_nearest():
    assert choose({"a": 1}, "a", "key") == 1
    with pytest.raises(
        ConfigError, match=r"method.name: expected one of standard, pgd_at, got 'pgdat'; did you mean 'pgd_at'"
    ):
        choose({"standard": 0, "pgd_at": 1}, "pgdat", "method.name")


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", Fraction(8, 255)), (" 8 / 255 ", Fraction(8, 255)), (0.1, Fraction(1, 10)), ("1e-3", Fraction(1, 1000))],
)
def test_fractions_are_exact(text, value):
    assert parse_fraction(text) == value


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["model.width=8", "model={blocks: [1,1]}"], "model.width", 8),  # a section in one piece adds to what was said
        (["eval.every=5", "eval={batch_size: 64}"], "eval.every", 5),
        (["method.attack.steps=3", "method.attack={}"], "method.attack.steps", 3),
        (["model.dual.standard.width=8", "model.dual.standard=null"], "model.dual.standard", None),
        (["model.dual.standard=null", "model.dual.standard.width=8"], "model.dual.standard.width", 8),
        (["eval.attack.eps=1/4", "eval.attack=apgd-ce"], "eval.attack.eps", "1/4"),
    ],
)
def test_a_later_override_counts_and_forgets_nothing_else(overrides: list[str], key: str, value: object):
    assert flatten(load_config(None, overrides))[key] == value


def test_a_tilde_is_null_in_a_file_and_the_home_folder_in_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/of")
    (tmp_path / "run.yaml").write_text("data: {name: cifar10, root: ~, expects: ~}\nmodel: {init_from: '~'}\n")
    config = load_config(tmp_path / "run.yaml")
    assert (config.data.root, config.data.expects, config.model.init_from) == (None, None, "/home/of")
    assert load_config(None, ["data=cifar10", "data.root=~"]).data.root == "/home/of"
