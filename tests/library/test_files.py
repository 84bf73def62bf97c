"""A delta's two files: strict reading, atomic writing, and a digest that ties the pair together."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from bitfit_hf.errors import BitFitError, DeltaFormatError, DeltaIOError, DeltaNotFoundError
from bitfit_hf.storage import files
from bitfit_hf.storage.files import (
    CONFIG_FILE,
    PENDING_CONFIG_FILE,
    WEIGHTS_FILE,
    check_values,
    digest,
    read_config,
    read_pair,
    read_tensors,
    write_bytes,
    write_pair,
)
from bitfit_hf.storage.keys import FILE_PREFIX

Tensors = dict[str, torch.Tensor]


def tensors(value: float) -> Tensors:
    return {
        FILE_PREFIX + "a.bitfit_bias": torch.full((3,), value),
        FILE_PREFIX + "c.weight": torch.full((2, 3), value),
    }


def config(value: float) -> dict:
    return {"peft_type": "BITFIT", "value": value}


def loads(folder: Path) -> float:
    """The value that both files of a folder agree on."""
    values, found = read_pair(folder)
    (value,) = {number for tensor in found.values() for number in tensor.flatten().tolist()}
    assert values["value"] == value
    return value


# Writing -------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "made" / "on the way"
    write_pair(folder, config(1), tensors(1))
    values, found = read_pair(folder)
    assert values == {**config(1), "weights_digest": digest(tensors(1))}
    assert found.keys() == tensors(1).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(1).items())
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    write_pair(folder, config(2), tensors(2))
    assert loads(folder) == 2
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


def test_equal_deltas_give_equal_files(tmp_path):
    write_pair(tmp_path / "a", config(1), tensors(1))
    write_pair(tmp_path / "b", dict(reversed(config(1).items())), dict(reversed(tensors(1).items())))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_views_and_shared_tensors_are_written_whole(tmp_path):
    long = torch.arange(12.0)
    write_pair(tmp_path, {}, {"a": long[::2], "b": long[:3], "c": long[:3], "d": long.view(3, 4).t()})
    found = load_file(tmp_path / WEIGHTS_FILE)
    assert found["a"].tolist() == [0, 2, 4, 6, 8, 10]
    assert found["b"].tolist() == found["c"].tolist() == [0, 1, 2]
    assert torch.equal(found["d"], long.view(3, 4).t())


class Died(BaseException):
    """Stands for a process that is killed."""


STEPS = ("os.replace", "os.fsync", "os.fdopen", "os.chmod", "tempfile.mkstemp")


@pytest.fixture
def dying(monkeypatch):
    """Makes the n-th call of one step of writing fail, before or after it has been done."""

    def arm(step: str, call: int, *, after: bool, error: BaseException) -> list[str]:
        module, name = step.split(".")
        target = getattr(files, module)
        original, calls = getattr(target, name), []

        def replacement(*args, **kwargs):
            calls.append(str(args[:1]))
            if len(calls) == call and not after:
                raise error
            result = original(*args, **kwargs)
            if len(calls) == call:
                raise error
            return result

        monkeypatch.setattr(target, name, replacement)
        return calls

    return arm


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_moment_leaves_the_old_delta_or_the_new(step, call, after, tmp_path, dying, monkeypatch):
    write_pair(tmp_path, config(1), tensors(1))
    with monkeypatch.context():
        calls = dying(step, call, after=after, error=Died())
        died = False
        try:
            write_pair(tmp_path, config(2), tensors(2))
        except Died:
            died = True
        monkeypatch.undo()
    assert died == (len(calls) >= call)
    assert loads(tmp_path) in (1, 2)
    if not died:
        assert loads(tmp_path) == 2
    write_pair(tmp_path, config(3), tensors(3))  # the next save clears up
    assert loads(tmp_path) == 3
    assert not (tmp_path / PENDING_CONFIG_FILE).exists()


def test_every_step_of_writing_is_among_those_that_are_made_to_fail(tmp_path, dying, monkeypatch):
    """Guards the test above: two temporary files are written and synced, and three names replaced."""
    expected = {"os.replace": 3, "os.fsync": 5, "os.fdopen": 2, "os.chmod": 2, "tempfile.mkstemp": 2}
    counted = {}
    for step in STEPS:
        with monkeypatch.context():
            calls = dying(step, 99, after=False, error=Died())
            write_pair(tmp_path, config(1), tensors(1))
            monkeypatch.undo()
        counted[step] = len(calls)
    assert counted == expected


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_leaves_what_was_there(step, call, tmp_path, dying, monkeypatch):
    write_pair(tmp_path, config(1), tensors(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context():
        dying(step, call, after=False, error=OSError(28, "No space left on device"))
        failed = False
        try:
            write_pair(tmp_path, config(2), tensors(2))
        except DeltaIOError as error:
            failed = True
            assert "No space left" in str(error)  # noqa: PT017
        monkeypatch.undo()
    assert failed
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert loads(tmp_path) in (1, 2)
    if step != "os.fsync":  # after the folder's sync fails, the new name is there already
        assert after == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DeltaIOError, match="cannot be written"):
        write_pair(tmp_path, config(1), tensors(1))
    tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_or_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeltaIOError, match="file"):
        write_pair(tmp_path / "file", config(1), tensors(1))
    (tmp_path / "folder" / WEIGHTS_FILE).mkdir(parents=True)
    with pytest.raises(DeltaIOError, match=WEIGHTS_FILE):
        write_pair(tmp_path / "folder", config(1), tensors(1))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [WEIGHTS_FILE]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_permissions_that_other_files_get(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_pair(tmp_path, config(1), tensors(1))
        (tmp_path / "other").write_text("")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


def test_write_bytes_replaces_in_one_step(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old" * 1000)
    seen = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(50):
        write_bytes(path, b"new" * 2000)
        write_bytes(path, b"old" * 1000)
    stop.set()
    reader.join()
    assert seen <= {b"new" * 2000, b"old" * 1000}


def _write_many(folder: str, value: int) -> None:
    for _ in range(15):
        write_pair(folder, config(value), tensors(value))


def test_two_writers_and_a_reader_never_see_a_mixture(tmp_path):
    write_pair(tmp_path, config(1), tensors(1))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), value)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers):
        seen.append(loads(tmp_path))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert set(seen) <= {1, 2}
    assert loads(tmp_path) in (1, 2)


# Reading -------------------------------------------------------------------------------------------------------------


def test_a_pair_from_two_saves_is_refused(tmp_path):
    write_pair(tmp_path / "a", config(1), tensors(1))
    write_pair(tmp_path / "b", config(2), tensors(2))
    (tmp_path / "a" / WEIGHTS_FILE).write_bytes((tmp_path / "b" / WEIGHTS_FILE).read_bytes())
    with pytest.raises(DeltaFormatError, match="two different saves"):
        read_pair(tmp_path / "a")


def test_the_waiting_configuration_counts_only_with_its_own_weights(tmp_path):
    write_pair(tmp_path, config(1), tensors(1))
    pending = {**config(2), "weights_digest": digest(tensors(2))}
    (tmp_path / PENDING_CONFIG_FILE).write_text(json.dumps(pending))
    assert loads(tmp_path) == 1
    save_file(tensors(2), tmp_path / WEIGHTS_FILE)
    assert loads(tmp_path) == 2
    save_file(tensors(3), tmp_path / WEIGHTS_FILE)
    with pytest.raises(DeltaFormatError, match="two different saves"):
        read_pair(tmp_path)


def test_a_first_save_that_was_cut_short(tmp_path):
    pending = {**config(2), "weights_digest": digest(tensors(2))}
    (tmp_path / PENDING_CONFIG_FILE).write_text(json.dumps(pending))
    with pytest.raises(DeltaNotFoundError, match="incomplete"):
        read_pair(tmp_path)
    save_file(tensors(2), tmp_path / WEIGHTS_FILE)
    assert loads(tmp_path) == 2


def test_a_damaged_leftover_does_not_block_a_good_pair(tmp_path):
    write_pair(tmp_path, config(1), tensors(1))
    (tmp_path / PENDING_CONFIG_FILE).write_bytes(b"{half")
    assert loads(tmp_path) == 1


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DeltaNotFoundError, match=CONFIG_FILE):
        read_pair(tmp_path)
    with pytest.raises(DeltaNotFoundError, match=CONFIG_FILE) as caught:
        read_pair(tmp_path / "nowhere")
    assert isinstance(caught.value, FileNotFoundError)
    (tmp_path / CONFIG_FILE).write_text("{}")
    with pytest.raises(DeltaNotFoundError, match=r"adapter_model\.safetensors does not exist.*incomplete"):
        read_pair(tmp_path)
    torch.save(tensors(1), tmp_path / "adapter_model.bin")
    with pytest.raises(DeltaNotFoundError, match="pickled weights are never read"):
        read_pair(tmp_path)


def test_tensors_are_read_into_aligned_memory_of_their_own(tmp_path):
    save_file({"a": torch.ones(1), "b": torch.ones(7), "c": torch.ones(5)}, tmp_path / "x.safetensors")
    found = read_tensors(tmp_path / "x.safetensors")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 3


def test_reading_leaves_nothing_behind(tmp_path):
    """A server reads deltas as long as it runs."""
    save_file({f"t{number}": torch.ones(2) for number in range(50)}, tmp_path / "x.safetensors")

    def left_behind(times: int) -> int:
        before = sys.getallocatedblocks()
        for _ in range(times):
            read_tensors(tmp_path / "x.safetensors")
        return sys.getallocatedblocks() - before

    left_behind(3)
    assert left_behind(20) < 200  # two for each tensor would be 2,000


def test_check_values_names_all_problems_at_once():
    with pytest.raises(DeltaFormatError) as caught:
        check_values(
            {
                "a": torch.tensor([1.0, float("nan")]),
                "b": torch.ones(2).half(),
                "c": torch.ones(2),
                "d": torch.ones(1) / 0,
            },
            where="here",
        )
    message = str(caught.value)
    assert "here" in message
    assert "a holds NaN" in message
    assert "b is float16" in message
    assert "d holds NaN" in message
    assert "c " not in message.replace("cannot", "")
    check_values({"norm.num_batches_tracked": torch.tensor(3), "a": torch.zeros(0)}, where="here")


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.tensor([1.0, 2.5])},
        {"y": torch.tensor([1.0, 2.0])},
        {"x": torch.tensor([[1.0, 2.0]])},
        {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([])},
        {"x": torch.tensor([1.0, 2.0]).view(torch.int32)},
    ],
)
def test_the_digest_tells_names_shapes_dtypes_and_values_apart(other):
    first = {"x": torch.tensor([1.0, 2.0])}
    assert digest(first) != digest(other)
    assert digest(first) == digest({FILE_PREFIX + "x": torch.tensor([1.0, 9.0, 2.0])[::2]})


def test_the_digest_takes_scalars_and_every_dtype():
    values = {str(dtype): torch.zeros(2, dtype=dtype) for dtype in (torch.bfloat16, torch.int64, torch.bool)}
    assert digest({**values, "scalar": torch.tensor(3.0)}).startswith("sha256:")


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Nobody else is saving in most of these tests, so waiting for them is in vain."""
    monkeypatch.setattr(files, "_PAUSE", 0.001)


# Whatever bytes are in the files, reading gives values or one of the library's own errors.

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = save(tensors(1.0), metadata={"format": "pt"})


@FUZZ
@given(st.binary(max_size=200))
@example(b"")
@example(b"\xff" * 8)
@example((2**63).to_bytes(8, "little") + b"{}")
@example((2).to_bytes(8, "little") + b"{}")
@example((2).to_bytes(8, "little") + b"[]")
def test_any_bytes_as_weights(tmp_path, data):
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(data)
    try:
        found = read_tensors(path)
    except BitFitError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())


@FUZZ
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.integers(0, len(GOOD)))
def test_a_changed_byte_or_a_cut_in_the_weights_is_noticed(tmp_path, position, value, length):
    write_pair(tmp_path, config(1.0), tensors(1.0))
    data = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    data[position % len(data)] = value
    changed = bytes(data[:length] if length % 2 else data)
    (tmp_path / WEIGHTS_FILE).write_bytes(changed)
    try:
        _, found = read_pair(tmp_path)
    except BitFitError:
        return
    assert digest(found) == digest(tensors(1.0))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b"\xef\xbb\xbf{}")
@example(b'{"a": 1' + b"0" * 5000 + b"}")
@example(b'"\\ud800"')
@example(b"NaN")
@example('{"a": "é"}'.encode("latin-1"))
def test_any_bytes_as_configuration(tmp_path, data):
    path = tmp_path / CONFIG_FILE
    path.write_bytes(data)
    try:
        values = read_config(path)
    except BitFitError:
        return
    assert isinstance(values, dict)


@FUZZ
@given(JSON)
def test_any_digest_in_the_configuration(tmp_path, value):
    write_pair(tmp_path, {}, tensors(1.0))
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"weights_digest": value}))
    try:
        values, _ = read_pair(tmp_path)
    except BitFitError:
        return
    assert values["weights_digest"] in (None, digest(tensors(1.0)))


def test_a_configuration_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MAX_CONFIG_BYTES", 10)
    (tmp_path / CONFIG_FILE).write_text('{"aaaaaaaaaaa": 1}')
    with pytest.raises(DeltaFormatError, match="too large"):
        read_config(tmp_path / CONFIG_FILE)


def test_a_folder_in_place_of_a_file_is_an_io_error(tmp_path):
    (tmp_path / CONFIG_FILE).mkdir()
    with pytest.raises(DeltaIOError):
        read_config(tmp_path / CONFIG_FILE)
    (tmp_path / WEIGHTS_FILE).mkdir()
    with pytest.raises((DeltaIOError, DeltaFormatError)):
        read_tensors(tmp_path / WEIGHTS_FILE)
