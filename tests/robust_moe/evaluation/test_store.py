"""The journal: whatever a kill leaves of it, all that was put before is there."""

import errno
import subprocess
import sys

import numpy as np
import pytest

from robust_moe.evaluation import Journal, ResumeError
from robust_moe.files import replace_file

ME = {"model": "aa", "eps": "8/255", "steps": 20, "threads": None}


def filled(path):
    journal = Journal(path, ME)
    journal.put("clean/0", {"prediction": np.array([3, 1, 2]), "seconds": 0.25, "routing": {"layer": [[1, 2]]}})
    journal.put("pgd/0", {"image": np.random.default_rng(0).random((2, 3, 4), np.float32), "wrong": np.array([], int)})
    journal.put("pgd/1", {"flags": [{"name": "x", "value": None}]})
    return journal


def assert_same(one, other, keys=("clean/0", "pgd/0", "pgd/1")):
    for key in keys:
        for name, value in one.get(key).items():
            again = other.get(key)[name]
            if isinstance(value, np.ndarray):
                assert again.dtype == value.dtype
                np.testing.assert_array_equal(again, value)
            else:
                assert again == value


def test_what_was_put_is_there_again(tmp_path):
    journal = filled(tmp_path / "deep" / "a.journal")
    journal.close()
    again = Journal(tmp_path / "deep" / "a.journal", ME)
    assert len(again) == len(journal) == 3
    assert_same(journal, again)
    assert again.get("pgd/2") is None
    assert [item.name for item in (tmp_path / "deep").iterdir()] == ["a.journal"]
    again.remove()
    assert not list((tmp_path / "deep").iterdir())


def test_a_second_opener_is_refused_until_the_first_lets_go(tmp_path):
    path = tmp_path / "a.journal"
    first = filled(path)
    before = path.read_bytes()
    for resume in (True, False):
        with pytest.raises(ResumeError, match=r"a\.journal: expected a journal of this evaluation alone, got one that"):
            Journal(path, ME, resume=resume)
    assert path.read_bytes() == before
    first.put("pgd/2", {"wrong": 1})
    first.close()
    with Journal(path, ME) as again:
        assert len(again) == 4
    code = "import sys; from pathlib import Path; from robust_moe.evaluation import Journal, ResumeError\n"
    code += f"try: Journal(Path(sys.argv[1]), {ME})\nexcept ResumeError: sys.exit(3)"
    with Journal(path, ME):
        assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == 3
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == 0


class Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def write(self, data) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "no space left")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 30])
def test_what_cannot_be_written_leaves_the_journal_whole(tmp_path, room):
    path = tmp_path / "a.journal"
    journal = filled(path)
    before, real = path.read_bytes(), journal._file
    journal._file = Full(real, room)
    with pytest.raises(OSError, match="no space left"):
        journal.put("pgd/2", {"wrong": 1})
    assert path.read_bytes() == before
    assert journal.get("pgd/2") is None
    journal._file = real
    journal.put("pgd/3", {"wrong": 2})
    journal.close()
    with Journal(path, ME) as again:
        assert len(again) == 4
        assert again.get("pgd/3") == {"wrong": 2}


def test_an_identity_is_claimed_once():
    journal = Journal(None, {})
    journal.claim("suite", {"model": "aa", "radii": (1, 2)})
    journal.claim("suite", {"radii": (1, 2), "model": "aa"})
    journal.claim("moe", {"model": "bb"})
    with pytest.raises(
        ResumeError, match="journal: expected that of this suite, got another's: model: 'bb' here, 'aa'"
    ):
        journal.claim("suite", {"model": "bb", "radii": (1, 2)})


def test_put_returns_what_get_will():
    journal = Journal(None, ME)
    assert journal.put("a", {"pair": (1, 2)}) == {"pair": [1, 2]} == journal.get("a")


def test_cut_within_the_last_line_only_that_line_is_lost(tmp_path):
    path = tmp_path / "a.journal"
    journal = filled(path)
    journal.close()
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in (start, start + 1, start + 9, start + 40, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        again = Journal(path, ME)
        assert len(again) == 2
        assert_same(journal, again, ("clean/0", "pgd/0"))
        assert path.read_bytes() == whole[:start]
        again.put("pgd/1", {"flags": [{"name": "x", "value": None}]})
        assert path.read_bytes() == whole  # as if nothing had been
        again.close()


@pytest.mark.parametrize(
    ("damaged", "lost"), [((2,), ("clean/0",)), ((3,), ("pgd/0",)), ((2, 3), ("clean/0", "pgd/0")), ((4,), ("pgd/1",))]
)
def test_a_damaged_line_is_named_and_costs_its_result_alone(tmp_path, damaged, lost):
    path = tmp_path / "a.journal"
    journal = filled(path)
    journal.put("pgd/2", {"wrong": 1})
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    for number in damaged:
        lines[number - 1] = lines[number - 1].replace(b'"key"', b'"kex"')
    path.write_bytes(b"".join(lines))
    numbers = ", ".join(map(str, damaged))
    with pytest.warns(UserWarning, match=rf"a\.journal: expected whole lines, passed over damaged lines: {numbers}$"):
        again = Journal(path, ME)
    assert [key for key in ("clean/0", "pgd/0", "pgd/1", "pgd/2") if again.get(key) is None] == list(lost)
    assert_same(journal, again, [key for key in ("clean/0", "pgd/0", "pgd/1") if key not in lost])
    for key in lost:
        again.put(key, journal.get(key))
    again.close()
    with pytest.warns(UserWarning, match="damaged lines"):
        last = Journal(path, ME)
    assert_same(journal, last)


def test_a_damaged_first_line_is_refused_by_name(tmp_path):
    path = tmp_path / "a.journal"
    filled(path).close()
    path.write_bytes(path.read_bytes().replace(b"8/255", b"7/255", 1))
    before = path.read_bytes()
    with pytest.raises(ResumeError, match=r"a\.journal: .* got a damaged line 1, which says whose it is; --fresh"):
        Journal(path, ME)
    assert path.read_bytes() == before
    assert len(Journal(path, ME, resume=False)) == 0
    assert len(path.read_bytes().splitlines()) == 1


def test_cut_within_the_first_line_a_journal_is_begun_anew(tmp_path):
    path = tmp_path / "a.journal"
    Journal(path, ME).close()
    header = path.read_bytes()
    for end in range(1, len(header)):
        path.write_bytes(header[:end])
        with pytest.warns(UserWarning, match=r"a\.journal: a kill cut its first line, before any result: begun anew"):
            Journal(path, ME).close()
        assert path.read_bytes() == header


def test_results_whose_claim_is_damaged_are_refused(tmp_path):
    path = tmp_path / "a.journal"
    with Journal(path, {}) as journal:
        journal.claim("moe", {"model": "aa"}, "moe/")
        journal.put("moe/clean/0", {"wrong": 1})
    path.write_bytes(path.read_bytes().replace(b'"aa"', b'"ab"'))
    with pytest.warns(UserWarning, match="damaged lines: 2$"), Journal(path, {}) as journal:
        journal.claim("curve", {"model": "bb"}, "curve/")  # has no results yet
        with pytest.raises(ResumeError, match=r"which moe the results are of, got a damaged line 2; --fresh"):
            journal.claim("moe", {"model": "bb"}, "moe/")


def test_a_file_that_a_kill_left_empty_is_begun_anew(tmp_path):
    path = tmp_path / "a.journal"
    path.write_bytes(b"")
    with Journal(path, ME) as journal:
        journal.put("a", {})
    assert len(Journal(path, ME)) == 1


@pytest.mark.parametrize("content", [b"\n", b"hello\n", b"\x00\xff" * 50, b'00000000 {"format": 1}\n'])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "a.journal"
    path.write_bytes(content)
    with pytest.raises(ResumeError, match="expected the journal of an evaluation, got another file"):
        Journal(path, ME)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({**ME, "model": "bb"}, "model: 'bb' here, 'aa' there"),
        ({**ME, "steps": 50, "eps": "4/255"}, "eps: '4/255' here, '8/255' there; steps: 50 here, 20 there"),
        ({key: value for key, value in ME.items() if key != "steps"}, "steps: 'nothing' here, 20 there"),
        ({**ME, "norm": "L2"}, "norm: 'L2' here, 'nothing' there"),
        ({**ME, "threads": 2}, "threads: 2 here, None there"),
        (dict.fromkeys("abcde", 1), "; and 6 more; --fresh (resume=False) starts anew"),
    ],
)
def test_another_evaluations_journal_is_refused_by_name(tmp_path, other, words):
    path = tmp_path / "a.journal"
    filled(path).close()
    before = path.read_bytes()
    with pytest.raises(ResumeError) as error:
        Journal(path, other)
    assert words in str(error.value)
    assert path.read_bytes() == before
    assert len(Journal(path, dict(reversed(ME.items())))) == 3  # the order is of no matter


def test_replacing_a_file_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a"
    replace_file(path, b"old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
