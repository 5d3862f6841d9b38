"""Which processes a run has, and processes that do not go together."""

import json
import sys
import textwrap

import pytest
from rank_runs import as_torchrun, run_all
from small_runs import TINY

from robust_moe.config import ConfigError, config_from_dict, load_config, save_config
from robust_moe.engine.fabric import backend_notes
from robust_moe.engine.world import World, world_of
from robust_moe.settings import plain


def environment(rank, size, local_size):
    return {
        "TORCHELASTIC_RUN_ID": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % local_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "GROUP_RANK": str(rank // local_size),
    }


def test_the_world_is_torchruns_or_that_of_run_devices():
    assert world_of(1, {}) == World(1, 0, 0, 1)
    assert world_of(1, {"LOCAL_RANK": "3"}) == World(1, 0, 0, 1)  # of another program's launcher
    assert world_of(4, {"LOCAL_RANK": "3"}) == World(4, 3, 3, 4)
    for devices in (1, 16):
        world = world_of(devices, environment(13, 16, 8))
        assert world == World(16, 13, 5, 8, torchrun=True)
        assert world.nodes == 2
    assert world_of(1, environment(0, 1, 1)).size == 1


def test_another_number_than_torchruns_is_refused():
    with pytest.raises(ConfigError, match=r"run.devices: expected 1, or 16 as torchrun has started processes .* got 8"):
        world_of(8, environment(0, 16, 8))


def test_machines_with_different_numbers_of_processes_are_refused():
    uneven = environment(0, 5, 2)
    with pytest.raises(ConfigError, match=r"torchrun: expected as many processes on every machine .* got 2 of 5 here"):
        world_of(1, uneven)
    later = {**environment(4, 6, 2), "GROUP_RANK": "1"}  # machines of 4 and 2: 6 is a multiple of 2
    with pytest.raises(ConfigError, match="as many processes on every machine"):
        world_of(1, later)


def test_gpus_without_nccl_exchange_by_gloo_and_a_line_says_so(monkeypatch):
    gpu = type("Device", (), {"type": "cuda"})()
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    (note,) = backend_notes(World(2, 0, 0, 2), gpu)
    assert "run.devices=2: this PyTorch has no NCCL" in note
    assert backend_notes(World(), gpu) == []
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    assert backend_notes(World(2, 0, 0, 2), gpu) == []


# Two processes, each of which says what it was refused with, case by case. A second process has settings, versions or a
# checkpoint of its own.
REFUSED = """
    import json, os, sys
    from robust_moe.config import ConfigError, load_config
    from robust_moe.engine import Reporter, Trainer, ranks

    folder, rank = sys.argv[1], int(os.environ["RANK"])
    versions, said = ranks.versions, {}
    for name in json.load(open(os.path.join(folder, "names.json"))):
        own = os.path.join(folder, f"{name} {rank}.yaml")
        config = load_config(own if os.path.exists(own) else os.path.join(folder, f"{name}.yaml"))
        older = {"torch": "1.0"} if name == "versions" and rank == 1 else {}
        ranks.versions = lambda older=older: {**versions(), **older}
        try:
            Trainer(config, Reporter(enabled=False)).fit()
        except ConfigError as error:
            said[name] = str(error)
    json.dump(said, open(os.path.join(folder, f"said {rank}.json"), "w"))
"""
CASES = {
    "settings": (),
    "versions": (),
    "batch": ("run.batch_size=15",),
    "few images": ("data.train_limit=9", "run.batch_size=16", "data.validation_fraction=0"),
    "blocks": ("model.name=preact_resnet18", "run.sync_batch_norm=true"),
}


@pytest.mark.slow
def test_processes_that_do_not_go_together_are_refused_by_each_with_one_sentence(tmp_path):
    small = plain(load_config(None, list(TINY)))
    for name, settings in CASES.items():
        save_config(config_from_dict(small, [*settings, f"run.out={tmp_path / name}"]), tmp_path / f"{name}.yaml")
    other = config_from_dict(small, ["optim.lr=0.01", f"run.out={tmp_path / 'settings'}"])
    save_config(other, tmp_path / "settings 1.yaml")
    (tmp_path / "names.json").write_text(json.dumps(list(CASES)))
    (tmp_path / "refused.py").write_text(textwrap.dedent(REFUSED))
    for status, _, text in run_all([sys.executable, str(tmp_path / "refused.py"), str(tmp_path)], as_torchrun(2)):
        assert status == 0, text
    first, second = (json.loads((tmp_path / f"said {rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    who = "torchrun, 2 processes: expected the same"
    lr = small["optim"]["lr"]
    assert first["settings"] == f"{who} optim.lr in every process, got 0.01 in process 1 and {lr} in process 0"
    assert first["versions"].startswith(f"{who} version of torch in every process, got '1.0' in process 1 and ")
    assert first["batch"].startswith("run.batch_size: expected a multiple of the 2 processes (torchrun, 2 processes)")
    assert first["few images"].startswith("run.batch_size: expected at most the 9 training images")
    assert first["blocks"].startswith("run.sync_batch_norm: norms: expected experts that may be given no rows")
    assert first.keys() == CASES.keys()


LOST = """
    import sys
    from robust_moe.engine.world import agree, meet, world_of

    world = world_of(1)
    meet(world)
    if world.rank == 1:
        sys.exit(3)
    try:
        agree(world, {"fact": 1})
    except ConnectionError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_process_that_has_ended_before_all_agree_is_told_by_a_sentence(tmp_path):
    (tmp_path / "lost.py").write_text(textwrap.dedent(LOST))
    (status, said, errors), (ended, _, _) = run_all([sys.executable, str(tmp_path / "lost.py")], as_torchrun(2))
    assert (status, ended) == (0, 3), errors
    assert said == "expected 2 processes, got no answer from one that has ended\n"
