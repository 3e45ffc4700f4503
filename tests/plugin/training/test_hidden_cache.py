"""The store of hidden states: what goes in comes out, in any process, and only for what it was computed from."""

import errno
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from lmtp_factory.errors import LMTPError
from lmtp_factory.plugin.training import hidden_cache
from lmtp_factory.plugin.training.hidden_cache import HiddenCache
from lmtp_factory.plugin.training.shard_layout import ShardLayout


FACTS = {"base model": "tiny", "weights": "abc", "data": "def"}
LENGTHS = [3, 0, 5, 2, 9, 0, 1]
HIDDEN_SIZE = 4
# shards of at most 8 tokens: documents 0-2 (3 + 0 + 5), 3 (2), 4 (9 on its own), 5-6 (0 + 1)
SHARDS = [range(0, 3), range(3, 4), range(4, 5), range(5, 7)]


@pytest.fixture
def plan():
    return ShardLayout(LENGTHS, HIDDEN_SIZE, shard_bytes=8 * HIDDEN_SIZE * 2)


@pytest.fixture
def states():
    """The documents' states, each (length, hidden size)."""
    torch.manual_seed(0)
    return [torch.randn(length, HIDDEN_SIZE).bfloat16() for length in LENGTHS]


@pytest.fixture
def fill(plan, states):
    """Write the shards that a cache still lacks."""

    def run(cache):
        for index in cache.missing():
            cache.write(index, torch.cat([states[document] for document in plan.shards[index]]))

    return run


@pytest.fixture
def cache(tmp_path, plan, fill):
    """A full one."""
    cache = HiddenCache.open(tmp_path / "cache", plan, FACTS)
    fill(cache)
    return cache


def assert_holds(cache, states):
    assert cache.missing() == []
    for index, expected in enumerate(states):
        found = cache.document(index)
        assert found.dtype == torch.bfloat16 and found.shape == expected.shape and torch.equal(found, expected)


def test_states_come_back_exactly(cache, plan, states, tmp_path):
    assert plan.shards == SHARDS
    assert_holds(cache, states)
    assert_holds(HiddenCache.open(str(tmp_path / "cache"), plan, FACTS), states)
    expected = ["manifest.json", *(f"hidden-{index:05d}.safetensors" for index in range(4))]
    assert sorted(os.listdir(cache.folder)) == sorted(expected)


def test_other_dtypes_are_rounded_and_views_are_taken(cache, states):
    wide = torch.cat(states[:3]).float().T.contiguous().T.requires_grad_()
    cache.write(0, wide + 2**-20)
    assert torch.equal(cache.document(2), (states[2].float() + 2**-20).bfloat16())


def test_a_document_is_the_callers_own(cache, states):
    document = cache.document(2)
    assert document.untyped_storage().nbytes() == document.numel() * 2
    document.zero_()
    assert_holds(cache, states)


def test_a_cache_of_no_documents(tmp_path):
    cache = HiddenCache.open(tmp_path, ShardLayout([], 4), FACTS)
    assert cache.missing() == [] and cache.layout.bytes == 0


@pytest.mark.parametrize("index", [-1, len(LENGTHS)])
def test_document_that_is_not(cache, index):
    with pytest.raises(IndexError, match=f"document {index} of 7"):
        cache.document(index)


def test_shard_of_another_shape_is_not_written(cache, states):
    with pytest.raises(ValueError, match=r"shard 1 is \(2, 4\), not \(4, 2\)"):
        cache.write(1, torch.zeros(4, 2))
    assert_holds(cache, states)


def test_a_killed_run_goes_on(cache, plan, states, fill, tmp_path):
    shards = [cache._path(index) for index in range(4)]
    kept = shards[3].stat()
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-3])
    save_file({"hidden": torch.zeros(9, HIDDEN_SIZE)}, shards[2])  # right but for the dtype
    leftover = shards[0].with_name(f".{shards[0].name}.abc123.tmp")
    leftover.write_bytes(b"half")
    again = HiddenCache.open(cache.folder, plan, FACTS)
    assert again.missing() == [0, 1, 2]
    fill(again)
    assert_holds(again, states)
    assert not leftover.exists() and shards[3].stat().st_mtime_ns == kept.st_mtime_ns


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "is truncated or damaged"),
        (lambda path: path.write_bytes(b""), "is truncated or damaged"),
        (lambda path: save_file({"other": torch.zeros(2, 4).bfloat16()}, path), "is truncated or damaged"),
        (lambda path: save_file({"hidden": torch.zeros(3, 4).bfloat16()}, path), "holds states of another shape"),
    ],
)
def test_shard_that_is_missing_or_damaged_is_named(cache, states, damage, message):
    path = cache._path(1)
    assert torch.equal(cache.document(3), states[3])  # so that its file is open
    damage(path)
    with pytest.raises(LMTPError, match=rf"^{re.escape(str(path))} {message}.*: start the training again"):
        cache.document(3)
    assert torch.equal(cache.document(4), states[4])


def test_a_folder_that_was_deleted_and_filled_again_is_read_again(cache, plan, tmp_path):
    cache.document(3)
    shutil.rmtree(cache.folder)
    other = HiddenCache.open(cache.folder, plan, {"base model": "other"})
    other.write(1, torch.ones(2, HIDDEN_SIZE))
    assert torch.equal(other.document(3), torch.ones(2, HIDDEN_SIZE, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (FACTS | {"weights": "xyz"}, "weights = 'abc', now it is 'xyz'"),
        (FACTS | {"tokens": "3"}, "tokens = None, now it is '3'"),
        ({"base model": "tiny", "data": "def"}, "weights = 'abc', now it is None"),
    ],
)
def test_other_facts_are_refused(cache, plan, states, facts, message):
    expected = f"The hidden states in `{cache.folder}` were computed with {message}: write another hidden_cache_dir"
    with pytest.raises(LMTPError, match=re.escape(expected)):
        HiddenCache.open(cache.folder, plan, facts)
    assert_holds(cache, states)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LENGTHS, 8, 64), "hidden_size = 4, now it is 8"),
        ((LENGTHS, HIDDEN_SIZE, 128), "shard_bytes = 64, now it is 128"),
        ((LENGTHS[::-1], HIDDEN_SIZE, 64), "lengths = '"),
        ((LENGTHS[:-1], HIDDEN_SIZE, 64), "documents = 7, now it is 6"),
    ],
)
def test_other_plans_are_refused(cache, arguments, message):
    with pytest.raises(LMTPError, match=re.escape(f"`{cache.folder}` were computed with {message}")):
        HiddenCache.open(cache.folder, ShardLayout(*arguments), FACTS)


def test_other_format_is_refused(cache, plan, monkeypatch):
    monkeypatch.setattr(hidden_cache, "FORMAT", hidden_cache.FORMAT + 1)
    with pytest.raises(LMTPError, match="are in format 3, this version reads format 4: write another hidden_cache_dir"):
        HiddenCache.open(cache.folder, plan, FACTS)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}", b"null", b'{"format": 3}'])
def test_damaged_manifest_is_refused(cache, plan, content):
    path = cache.folder / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(LMTPError, match=rf"^{re.escape(str(path))} is damaged: write another hidden_cache_dir"):
        HiddenCache.open(cache.folder, plan, FACTS)
    assert path.read_bytes() == content


def test_the_first_version_s_cache_is_refused_by_its_format(cache, plan):
    path = cache.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1, "facts": {"weights": "abc"}}))
    with pytest.raises(LMTPError, match="are in format 1, this version reads format 3"):
        HiddenCache.open(cache.folder, plan, FACTS)


def test_manifest_whose_facts_are_none_is_refused(cache, plan):
    path = cache.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"facts": "tiny"}))
    with pytest.raises(LMTPError, match="is damaged"):
        HiddenCache.open(cache.folder, plan, FACTS)


def test_foreign_files_are_left_alone(tmp_path, plan):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(LMTPError, match=rf"^`{re.escape(str(tmp_path))}` holds other files and no manifest.json"):
        HiddenCache.open(tmp_path, plan, FACTS)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_manifest_being_written_is_no_foreign_file(tmp_path, plan):
    (tmp_path / ".manifest.json.abc123.tmp").touch()
    assert HiddenCache.open(tmp_path, plan, FACTS).missing() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_folder_that_cannot_be_made(tmp_path, plan, name):
    (tmp_path / "file").touch()
    with pytest.raises(LMTPError, match=r"file.*` cannot hold .* \(Not a directory\): name another folder"):
        HiddenCache.open(tmp_path / name, plan, FACTS)


def disk_with(free, asked):
    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=free)

    return usage


def test_too_little_room_is_refused_before_anything_is_written(tmp_path, plan, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", disk_with(159, asked))
    folder = tmp_path / "a" / "b"
    with pytest.raises(LMTPError, match="to `.*b` take 160 bytes, and its disk has 159 bytes free: name a folder on a"):
        HiddenCache.open(folder, plan, FACTS)
    assert asked == [tmp_path] and os.listdir(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", disk_with(160, asked))
    assert HiddenCache.open(folder, plan, FACTS).missing() == [0, 1, 2, 3]


def test_only_missing_shards_need_room(cache, plan, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", disk_with(71, []))
    HiddenCache.open(cache.folder, plan, FACTS)
    cache._path(2).unlink()  # 9 tokens
    with pytest.raises(LMTPError, match="take 72 bytes, and its disk has 71 bytes free"):
        HiddenCache.open(cache.folder, plan, FACTS)


def test_a_disk_that_fills_up_keeps_what_was_there(cache, states, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = r"hidden-00001.safetensors` cannot be written \(No space left on device\): make room"
    with pytest.raises(LMTPError, match=message):
        cache.write(1, torch.zeros(2, HIDDEN_SIZE))
    assert_holds(cache, states)
    assert not list(cache.folder.glob(".*"))


class Documents(Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        return os.getpid(), self.cache.document(index)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_right_documents(cache, states, method):
    assert_holds(cache, states)  # the parent has opened the shards
    loader = DataLoader(Documents(cache), batch_size=None, num_workers=2, multiprocessing_context=method)
    for _ in range(2 if method == "fork" else 1):  # a second pass starts new workers, which takes spawn long
        processes, documents = zip(*loader)
        assert len(set(processes) - {os.getpid()}) == 2
        for found, expected in zip(documents, states, strict=True):
            assert torch.equal(found, expected)
    assert_holds(cache, states)
