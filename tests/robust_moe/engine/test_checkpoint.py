import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from robust_moe.config import ConfigError, config_from_dict
from robust_moe.engine import CheckpointError, load_checkpoint, save_checkpoint
from robust_moe.engine.checkpoint import load_model_state

STATE = {
    "config": {"run": {"seed": 0}},
    "data": {"mean": [0.5]},
    "model": {"weight": torch.arange(6.0).reshape(2, 3)},
    "position": {"step": 3},
}


def contents(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


def test_round_trip_and_nothing_else_in_the_folder(tmp_path):
    save_checkpoint(STATE, tmp_path / "deep" / "last.pt")
    state = load_checkpoint(tmp_path / "deep" / "last.pt")
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert {key: state[key] for key in ("config", "data", "position")} == {
        key: STATE[key] for key in ("config", "data", "position")
    }
    assert contents(tmp_path / "deep") == ["last.pt"]


class FullDisk:
    """A file on a disk that is full after ``room`` bytes."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data):
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("room", [0, 200, 1500])  # at the header, within the data, at the directory of the archive
def test_full_disk_keeps_the_last_good_one(tmp_path, monkeypatch, room):
    path = tmp_path / "last.pt"
    save_checkpoint(STATE, path)
    before = path.read_bytes()
    real_open = open
    module = sys.modules["robust_moe.files"]
    monkeypatch.setattr(module, "open", lambda *a: FullDisk(real_open(*a), room), raising=False)
    with pytest.raises(CheckpointError, match=r"could not be written.*the last good one is kept"):
        save_checkpoint({**STATE, "position": {"step": 4}}, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert contents(tmp_path) == ["last.pt"]
    assert load_checkpoint(path)["position"] == {"step": 3}


@pytest.mark.parametrize(
    ("code", "fails", "written"),
    [
        (errno.ESTALE, 1, True),  # the server of a network file system has restarted
        (errno.EIO, 1, True),
        (errno.ESTALE, 2, False),
        (errno.ENOSPC, 1, False),  # a full disk is no fuller for a second try at once
    ],
)
def test_a_handle_that_a_server_lost_is_written_once_more(tmp_path, monkeypatch, code, fails, written):
    save_checkpoint(STATE, tmp_path / "last.pt")
    left, real = [None] * fails, os.fsync

    def lose(handle):
        if left:
            left.pop()
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", lose)
    newer = {**STATE, "position": {"step": 4}}
    if written:
        save_checkpoint(newer, tmp_path / "last.pt")
    else:
        with pytest.raises(CheckpointError, match=os.strerror(code)):
            save_checkpoint(newer, tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "last.pt")["position"] == {"step": 4 if written else 3}
    assert contents(tmp_path) == ["last.pt"]


def test_a_folder_that_cannot_be_synchronised_is_no_failure(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    save_checkpoint(STATE, tmp_path / "last.pt")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "last.pt")["position"] == {"step": 3}


def test_no_room_at_all_says_that_there_is_no_earlier_one(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"No space left.*there is no earlier one"):
        save_checkpoint(STATE, tmp_path / "last.pt")
    assert contents(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX's")
def test_real_write_failure_keeps_the_last_good_one(tmp_path):
    # the operating system itself refuses to write past 64 KiB
    script = """
        import resource, signal, sys, torch
        from robust_moe.engine.checkpoint import CheckpointError, save_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        state = {"config": {}, "data": {}, "position": {}, "model": {"w": torch.zeros(10)}}
        save_checkpoint(state, sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            save_checkpoint({**state, "model": {"w": torch.zeros(1_000_000)}}, sys.argv[1])
        except CheckpointError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "last.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert "the last good one is kept" in done.stdout
    assert load_checkpoint(tmp_path / "last.pt")["model"]["w"].shape == (10,)
    assert contents(tmp_path) == ["last.pt"]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_kill_while_saving_keeps_the_last_good_one(tmp_path):
    # killed between writing and naming the new file: the worst moment
    script = """
        import os, signal, sys, torch
        from robust_moe.engine.checkpoint import save_checkpoint
        state = {"config": {}, "data": {}, "model": {}, "position": {"step": 1}}
        save_checkpoint(state, sys.argv[1])
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        save_checkpoint({**state, "position": {"step": 2}}, sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "last.pt")]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "last.pt")["position"] == {"step": 1}


def damaged(data: bytes, how: str) -> bytes:
    if how == "empty":
        return b""
    if how == "truncated":
        return data[: len(data) // 2]
    if how == "flipped":  # one bit within a tensor's bytes: only a checksum can tell
        place = data.index(torch.arange(6.0).numpy().tobytes())
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    return b"this is no archive" * 100


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped", "other"])
def test_damaged_files_are_refused_by_name(tmp_path, how):
    path = tmp_path / "last.pt"
    save_checkpoint(STATE, path)
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(CheckpointError, match=r"last.pt: expected a whole checkpoint, got"):
        load_checkpoint(path)


def test_missing_foreign_and_newer_files_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.pt: expected a checkpoint file, found nothing"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"expected a checkpoint file, found a folder"):
        load_checkpoint(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"foreign.pt: expected a checkpoint of robust-moe, .* without config"):
        load_checkpoint(tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"without config, data, model, position"):
        load_checkpoint(tmp_path / "list.pt")
    save_checkpoint({**STATE, "format": 99}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match=r"newer.pt: expected checkpoint format 2, got 99"):
        load_checkpoint(tmp_path / "newer.pt")


@pytest.mark.parametrize("section", ["data", "model", "method", "optim", "eval"])
@pytest.mark.parametrize("value", [None, 3, "text", [1], {"name": [1], "attack": 3}])
def test_a_malformed_configuration_of_format_1_is_refused(tmp_path, section, value):
    save_checkpoint({**STATE, "format": 1, "config": {section: value}}, tmp_path / "old.pt")
    with pytest.raises((CheckpointError, ConfigError), match="expected"):
        config_from_dict(load_checkpoint(tmp_path / "old.pt")["config"])


@pytest.mark.parametrize("value", [None, 3, "text", [1, 2], torch.zeros(3)])
@pytest.mark.parametrize("key", ["config", "data", "model", "position"])
def test_parts_of_another_kind_are_refused_by_name(tmp_path, key, value):
    save_checkpoint({**STATE, key: value}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=rf"last.pt: .*dicts; got {key}: {type(value).__name__}"):
        load_checkpoint(tmp_path / "last.pt")


def test_code_in_a_file_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({**STATE, "format": 1, "extra": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil.pt: expected plain types and tensors, got .* refused .*mkdir"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Linear(4, 2), ["weight: expected shape [2, 4], got [2, 3]"]),
        (nn.Linear(3, 2, bias=False), ["bias: not in the model, got it in the checkpoint"]),
        (nn.Sequential(nn.Linear(3, 2)), ["0.weight: expected in the checkpoint, got nothing", "and 1 more"]),
    ],
)
def test_other_architecture_is_refused_and_the_model_untouched(other, words):
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"x.pt: a checkpoint of another architecture") as error:
        load_model_state(other, nn.Linear(3, 2).state_dict(), "x.pt")
    for word in words:
        assert word in str(error.value)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])
