"""Checkpoints in the background: what is written, in which order, and what becomes of a file that cannot be."""

import errno
import os
import threading

import pytest
import torch

from robust_moe.engine import CheckpointError, load_checkpoint, run_checkpoints, writer
from robust_moe.engine.writer import CheckpointWriter, on_host


def state(step: int, weight: torch.Tensor | None = None) -> dict:
    weight = torch.full((3,), float(step)) if weight is None else weight
    return {"config": {}, "data": {}, "model": {"weight": weight}, "position": {"step": step}}


def steps(folder) -> dict[str, int]:
    return {path.name: load_checkpoint(path)["position"]["step"] for path in sorted(folder.glob("*.pt"))}


class Disk:
    """Renames checkpoints as the system does, but for those that it refuses; the names that it was asked for."""

    def __init__(self, monkeypatch):
        self.refused, self.asked, self.real = 0, [], os.replace
        monkeypatch.setattr(os, "replace", self.replace)

    def replace(self, source, target):
        self.asked.append(os.path.basename(target))
        if self.refused:
            self.refused -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.real(source, target)


def test_the_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    allowed, real = threading.Event(), os.replace
    monkeypatch.setattr(os, "replace", lambda *names: allowed.wait(60) and real(*names))
    weight = torch.zeros(3)
    with CheckpointWriter(tmp_path) as checkpoints:
        checkpoints.save(state(1, weight), "last.pt")
        assert not (tmp_path / "last.pt").exists()  # on its way
        weight += 1  # the next step
        checkpoints.check()  # waits for nothing
        allowed.set()
    assert torch.equal(load_checkpoint(tmp_path / "last.pt")["model"]["weight"], torch.zeros(3))


def test_one_is_written_at_a_time_in_the_order_of_the_saves(tmp_path, monkeypatch):
    events, real = [], writer.save_checkpoint

    def watched(content, path):
        events.append(("begins", path.name, content["position"]["step"]))
        real(content, path)
        events.append(("ends", path.name, content["position"]["step"]))

    monkeypatch.setattr(writer, "save_checkpoint", watched)
    with CheckpointWriter(tmp_path) as checkpoints:
        for step, names in ((1, ["last.pt"]), (2, ["best.pt", "last.pt"]), (3, ["last.pt"])):
            checkpoints.save(state(step), *names)
    written = [("last.pt", 1), ("best.pt", 2), ("last.pt", 2), ("last.pt", 3)]
    assert events == [(what, *each) for each in written for what in ("begins", "ends")]


def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, monkeypatch):
    disk, said = Disk(monkeypatch), []
    with CheckpointWriter(tmp_path, say=said.append) as checkpoints:
        checkpoints.save(state(1), "best.pt", "last.pt")
        checkpoints.wait()
        disk.refused = 2
        checkpoints.save(state(2), "best.pt", "last.pt")
        checkpoints.save(state(3), "last.pt")
        checkpoints.wait()
        assert steps(tmp_path) == {
            "best.pt": 1,
            "last.pt": 1,
        }  # last.pt knows of no better one
        checkpoints.save(state(4), "last.pt")
    assert steps(tmp_path) == {"best.pt": 2, "last.pt": 4}
    assert disk.asked == ["best.pt", "last.pt", "best.pt", "best.pt", "best.pt", "last.pt"]
    sentence = (
        f"{tmp_path / 'best.pt'}: the checkpoint could not be written ([Errno 28] No space left on device: "
        f"'{tmp_path / 'best.pt'}'); the last good one is kept; "
        "the training goes on, and the next checkpoint tries again"
    )
    assert said == [sentence] * 2


@pytest.mark.parametrize("names", [("best.pt", "last.pt"), ("best.pt",)])
def test_a_best_one_is_written_before_a_last_one_that_has_waited(tmp_path, monkeypatch, names):
    disk = Disk(monkeypatch)
    checkpoints = CheckpointWriter(tmp_path)
    disk.refused = 1
    checkpoints.save(state(1), "last.pt")
    checkpoints.wait()
    checkpoints.save(state(2), *names)
    checkpoints.finish()
    assert disk.asked == ["last.pt", "best.pt", "last.pt"]
    assert steps(tmp_path) == {"best.pt": 2, "last.pt": len(names)}


def test_a_failure_is_told_as_soon_as_it_is_known(tmp_path, monkeypatch):
    disk, said = Disk(monkeypatch), []
    checkpoints = CheckpointWriter(tmp_path, say=said.append)
    disk.refused = 1
    checkpoints.save(state(1), "last.pt")
    checkpoints._thread.join()
    checkpoints.check()
    assert len(said) == 1 and "could not be written" in said[0]
    checkpoints.check()
    assert len(said) == 1
    checkpoints.finish()
    assert steps(tmp_path) == {"last.pt": 1}


@pytest.mark.parametrize("refused", [1, 2])
def test_only_a_last_checkpoint_that_fails_twice_ends_a_run(tmp_path, monkeypatch, refused):
    disk = Disk(monkeypatch)
    checkpoints = CheckpointWriter(tmp_path)
    checkpoints.save(state(1), "last.pt")
    checkpoints.wait()
    disk.refused = refused
    checkpoints.save(state(2), "last.pt")
    if refused == 1:
        checkpoints.finish()
        assert steps(tmp_path) == {"last.pt": 2}
        return
    with pytest.raises(CheckpointError, match=r"last.pt: the checkpoint could not be written .*last good one is kept"):
        checkpoints.finish()
    assert steps(tmp_path) == {"last.pt": 1}


@pytest.mark.parametrize("keep", [0, 1])
def test_a_file_system_that_does_not_even_tell_what_is_there_is_no_end(tmp_path, monkeypatch, keep):
    checkpoints = CheckpointWriter(tmp_path, keep=keep)
    checkpoints.save(state(1), "last.pt")
    checkpoints.wait()
    real = os.stat

    def lost(path, *arguments, **options):
        if str(path).endswith("last.pt"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lost)
        patch.setattr(os, "fsync", lambda _: lost("last.pt"))
        checkpoints.save(state(2), "last.pt")
        with pytest.raises(CheckpointError, match=r"\.pt: the .* could not be .*Input/output error"):
            checkpoints.finish()
    checkpoints.finish()
    assert steps(tmp_path) == {"last.pt": 2, **({"step-1.pt": 1} if keep else {})}


def test_an_error_that_ends_the_run_is_not_hidden_by_a_full_disk(tmp_path, monkeypatch):
    disk, said = Disk(monkeypatch), []
    with (
        pytest.raises(FloatingPointError, match="lost"),
        CheckpointWriter(tmp_path, say=said.append) as checkpoints,
    ):
        disk.refused = 9
        checkpoints.save(state(1), "last.pt")
        raise FloatingPointError("lost")
    assert len(said) == 1 and "there is no earlier one" in said[0]


def test_another_error_of_the_thread_is_raised_at_the_next_save_and_nothing_is_written_after_it(tmp_path):
    def refuse():
        raise ValueError("another training")

    checkpoints = CheckpointWriter(tmp_path, before=refuse)
    checkpoints.save(state(1), "last.pt")
    with pytest.raises(ValueError, match="another training"):
        checkpoints.save(state(2), "last.pt")
    checkpoints.finish()
    assert steps(tmp_path) == {}


def test_where_the_system_allows_no_thread_the_training_waits_for_the_file(tmp_path, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    checkpoints = CheckpointWriter(tmp_path)
    checkpoints.save(state(1), "last.pt")
    assert steps(tmp_path) == {"last.pt": 1}
    checkpoints.finish()


def test_what_follows_the_files_fails_as_they_do(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "config.yaml")

    checkpoints = CheckpointWriter(tmp_path, after=full)
    checkpoints.save(state(1), "last.pt")
    with pytest.raises(CheckpointError, match=r"config.yaml: the settings .* \(No space left on device\)$"):
        checkpoints.finish()
    assert steps(tmp_path) == {"last.pt": 1}


@pytest.mark.parametrize("told", [False, True])
def test_what_follows_the_files_is_tried_again_at_the_end(tmp_path, told):
    fails = iter([OSError(errno.ENOSPC, "No space left on device", "config.yaml")])
    calls, said = [], []

    def after():
        calls.append(steps(tmp_path))
        for error in fails:
            raise error

    checkpoints = CheckpointWriter(tmp_path, after=after, say=said.append)
    checkpoints.save(state(1), "last.pt")
    if told:
        checkpoints.wait()
    checkpoints.finish()
    checkpoints.finish()  # nothing is left
    assert calls == [{"last.pt": 1}] * 2
    assert len(said) == told


# --- past checkpoints -------------------------------------------------------------------------------------------------


def refuse_links(*_):
    raise OSError(errno.EPERM, "no hard links")


@pytest.mark.parametrize("links", [True, False])
def test_past_checkpoints_are_kept_by_their_steps(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    (tmp_path / "step-1.pt.bak").write_text("mine")
    (tmp_path / "step-one.pt.txt").write_text("mine")
    with CheckpointWriter(tmp_path, keep=2) as checkpoints:
        for step in (2, 4, 4, 6, 8):  # at the end of an epoch a second one of as many steps
            checkpoints.save(state(step), "last.pt")
        checkpoints.save(state(8), "best.pt")
    assert steps(tmp_path) == {"best.pt": 8, "last.pt": 8, "step-4.pt": 4, "step-6.pt": 6}
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".pt") == [
        "step-1.pt.bak",
        "step-one.pt.txt",
    ]


def test_a_run_that_goes_on_keeps_what_it_began_from_and_drops_the_course_that_it_left(tmp_path):
    with CheckpointWriter(tmp_path, keep=3) as checkpoints:
        for step in (2, 4, 6, 8):
            checkpoints.save(state(step), "last.pt")
    (tmp_path / "last.pt").write_bytes((tmp_path / "step-4.pt").read_bytes())  # by hand
    with CheckpointWriter(tmp_path, keep=3, step=4) as checkpoints:
        checkpoints.save(state(5), "last.pt")
    assert steps(tmp_path) == {"last.pt": 5, "step-2.pt": 2, "step-4.pt": 4}
    with CheckpointWriter(tmp_path, step=5) as checkpoints:  # run.keep=0: none is made or removed
        checkpoints.save(state(6), "last.pt")
    assert steps(tmp_path) == {"last.pt": 6, "step-2.pt": 2, "step-4.pt": 4}


def test_a_past_checkpoint_is_whole_where_the_next_one_fails(tmp_path, monkeypatch):
    checkpoints = CheckpointWriter(tmp_path, keep=1)
    checkpoints.save(state(1), "last.pt")
    checkpoints.wait()
    disk = Disk(monkeypatch)
    real = disk.replace

    def full(source, target):  # the link is made, the file is not
        disk.refused = int(os.path.basename(target) == "last.pt")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    checkpoints.save(state(2), "last.pt")
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoints.finish()
    assert steps(tmp_path) == {"last.pt": 1, "step-1.pt": 1}
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(os, "replace", disk.real)
    checkpoints.finish()
    assert steps(tmp_path) == {"last.pt": 2, "step-1.pt": 1}


def test_a_past_checkpoint_that_cannot_be_kept_is_one_sentence_and_nothing_is_lost(tmp_path, monkeypatch):
    checkpoints = CheckpointWriter(tmp_path, keep=1)
    checkpoints.save(state(1), "last.pt")
    checkpoints.wait()
    monkeypatch.setattr(os, "link", refuse_links)
    disk = Disk(monkeypatch)
    disk.refused = 2
    checkpoints.save(state(2), "last.pt")
    with pytest.raises(CheckpointError, match=r"step-1.pt: the past checkpoint could not be kept \(.*No space left"):
        checkpoints.finish()
    assert steps(tmp_path) == {"last.pt": 1}


# --- which one to go on from ------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-400])


def test_the_error_of_a_damaged_file_names_the_newest_whole_one_and_how_to_go_on(tmp_path, monkeypatch):
    folder = tmp_path / "a run"
    with CheckpointWriter(folder, keep=3) as checkpoints:
        checkpoints.save(state(2), "best.pt", "last.pt")
        for step in (4, 6, 8):
            checkpoints.save(state(step), "last.pt")
    reader = run_checkpoints.CheckpointReader()
    assert reader.read(folder / "last.pt")["position"]["step"] == 8
    for name in ("last.pt", "step-6.pt"):
        cut(folder / name)
    read, load = [], run_checkpoints.load_checkpoint
    monkeypatch.setattr(run_checkpoints, "load_checkpoint", lambda path: read.append(path.name) or load(path))
    advice = rf"to go on from the newest whole one: cp '{folder}/step-4.pt' '{folder}/last.pt'$"
    with pytest.raises(CheckpointError, match=rf"last.pt: expected a whole checkpoint, got .*; {advice}"):
        reader.read(folder / "last.pt")
    assert read == ["last.pt", "best.pt", "step-6.pt", "step-4.pt"]  # each may be many gigabytes
    cut(folder / "step-4.pt")
    for path in (folder / "step-2.pt", folder / "best.pt"):  # of the same steps: the one that is always there last
        with pytest.raises(CheckpointError, match=rf"cp '{path}' "):
            reader.read(folder / "last.pt")
        path.unlink()
    with pytest.raises(CheckpointError, match=r"truncated or damaged file \([^;]*$"):
        reader.read(folder / "last.pt")


def test_a_damaged_best_one_is_gone_on_from_as_the_last_and_stays_the_best(tmp_path):
    with CheckpointWriter(tmp_path, keep=1) as checkpoints:
        for step in (2, 4):
            checkpoints.save(state(step), "last.pt")
        checkpoints.save(state(4), "best.pt")
    (tmp_path / "last.pt").unlink()
    cut(tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=rf"best.pt: .*cp {tmp_path}/step-2.pt {tmp_path}/last.pt$"):
        run_checkpoints.CheckpointReader().read(run_checkpoints.find_checkpoint(tmp_path))


def test_another_fault_than_damage_names_no_file_to_write_over_it(tmp_path):
    with CheckpointWriter(tmp_path, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(step), "last.pt")
        checkpoints.save({**state(3), "format": 99}, "last.pt")
    with pytest.raises(CheckpointError, match=r"expected checkpoint format 2, got 99$"):
        run_checkpoints.CheckpointReader().read(tmp_path / "last.pt")


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_has_the_values_views_and_layout_of_then():
    stacked = torch.arange(8.0)
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)).to(
        memory_format=torch.channels_last
    )
    original = {
        "model": module.state_dict(),
        "views": [stacked[:4], stacked[4:].view(2, 2).T],
        "complex": torch.tensor([1 + 2j]).conj(),
        "empty": torch.empty(0, 3),
        "plain": {"name": "a", "list": [1, 2]},
    }
    expected = {name: value.clone() for name, value in original["model"].items()}
    copied, event = on_host(original)
    assert event is None  # nothing is on its way from a GPU
    with torch.no_grad():
        for tensor in (stacked, original["complex"], *module.parameters(), *module.buffers()):
            tensor += 1
    original["plain"]["list"].append(3)
    assert list(copied["model"]) == list(expected) and copied["model"]._metadata == module.state_dict()._metadata
    for name, value in expected.items():
        assert torch.equal(copied["model"][name], value)
        assert copied["model"][name].stride() == value.stride()
    first, second = copied["views"]
    assert torch.equal(first, torch.arange(4.0)) and torch.equal(second, torch.tensor([[4.0, 6.0], [5.0, 7.0]]))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()  # one storage in the file, too
    assert torch.equal(copied["complex"], torch.tensor([1 - 2j]))
    assert copied["empty"].shape == (0, 3)
    assert copied["plain"] == {"name": "a", "list": [1, 2]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_from_a_gpu_is_of_its_step():
    weight = torch.zeros(2**24, device="cuda")
    busy = torch.rand(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 2048  # the copy waits behind it
    weight += 1
    copied, event = on_host({"weight": weight})
    weight += 1  # queued behind the copy
    event.synchronize()
    assert copied["weight"].is_pinned() and torch.equal(copied["weight"], torch.ones(2**24))
