"""Checkpoints: what is saved is loaded bit for bit, and what is not whole is never used."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxrl.errors import UserError
from jaxrl.runs import checkpoint
from jaxrl.types import PyTree, Spec, pytree


@pytree
class State:
    spec: Spec
    params: PyTree
    anchor: PyTree | None = None


@pytree
class Carry:
    agent: State
    key: jax.Array
    world: PyTree
    epoch: jax.Array


def carry(epoch: int, width: int = 3, anchor: bool = False) -> Carry:
    """Returns a carry of all kinds of leaves, whose numbers tell its epoch."""
    weights = jnp.arange(2.0 * width).reshape(2, width) / 7 + epoch
    state = State(Spec(2, 1), {"w": weights, "b": (jnp.full(width, jnp.nan),)}, {"w": weights} if anchor else None)
    flags = jnp.arange(5) % 2 == 0
    return Carry(state, jax.random.key(epoch), {"valid": flags, "steps": jnp.arange(4)}, jnp.int32(epoch))


def shapes(tree: PyTree):
    return lambda epoch: jax.eval_shape(lambda: tree)


def numbers(tree: PyTree) -> list[bytes]:
    leaves = (jax.random.key_data(x) if x.dtype == jax.random.key(0).dtype else x for x in jax.tree.leaves(tree))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_are_kept_and_the_newest_is_loaded_bit_for_bit(tmp_path):
    assert checkpoint.load(tmp_path, shapes(carry(0))) is None
    for epoch in (1, 2, 10):
        checkpoint.save(tmp_path, epoch, carry(epoch))
    assert names(tmp_path) == ["10", "10.json", "2", "2.json"]
    epoch, loaded = checkpoint.load(tmp_path, shapes(carry(0)))
    assert epoch == 10
    assert jax.tree.structure(loaded) == jax.tree.structure(carry(10))
    assert numbers(loaded) == numbers(carry(10))


def test_a_folder_that_is_not_there_has_no_checkpoint_and_stays_away(tmp_path):
    assert checkpoint.load(tmp_path / "none", shapes(carry(0))) is None
    assert names(tmp_path) == []


def test_some_fields_can_be_loaded_alone_whatever_the_others_are(tmp_path):
    checkpoint.save(tmp_path, 1, carry(1))
    _, loaded = checkpoint.load(tmp_path, shapes({"agent": carry(0).agent}))
    assert list(loaded) == ["agent"]
    assert numbers(loaded["agent"]) == numbers(carry(1).agent)


@pytest.mark.parametrize("file", range(9))
@pytest.mark.parametrize("harm", [lambda b: None, lambda b: b[: len(b) // 2], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_harm_to_any_file_is_found(tmp_path, capsys, file, harm):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, epoch, carry(epoch))
    files = sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) == 9
    content = harm(files[file].read_bytes())
    files[file].unlink() if content is None else files[file].write_bytes(content)
    epoch, loaded = checkpoint.load(tmp_path, shapes(carry(0)))
    assert epoch == 1 and numbers(loaded) == numbers(carry(1))
    name = files[file].relative_to(tmp_path / "2")
    wrong = f"{name} is {'missing' if content is None else 'changed'}"
    assert capsys.readouterr().err == f"checkpoint of epoch 2 is damaged ({wrong}): trying that of epoch 1\n"


def test_what_a_killed_process_left_is_not_used_and_removed(tmp_path):
    checkpoint.save(tmp_path, 1, carry(1))
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    ocp.save(str(tmp_path / "3"), carry(3))  # whole, but killed before its checksums were written
    assert checkpoint.load(tmp_path, shapes(carry(0)))[0] == 1
    checkpoint.keep(tmp_path, [1])
    assert names(tmp_path) == ["1", "1.json"]


def test_an_epoch_can_be_saved_again(tmp_path):
    checkpoint.save(tmp_path, 1, carry(5))
    checkpoint.save(tmp_path, 1, carry(1))
    assert numbers(checkpoint.load(tmp_path, shapes(carry(0)))[1]) == numbers(carry(1))


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (carry(1, width=4), "agent/params/b/0 is (3,) there and (4,) here"),
        (carry(1, anchor=True), "agent/anchor/w is absent there and (2, 3) here"),
    ],
)
def test_another_agents_checkpoint_is_refused_by_the_first_leaf_that_differs(tmp_path, here, message):
    checkpoint.save(tmp_path, 1, carry(1))
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path, shapes(here))
    assert str(error.value) == f"checkpoint {tmp_path / '1'} does not fit this agent and environment: {message}"


def full(*arguments, **more):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_underneath(path, *arguments, **more):
    Path(path + ".orbax-checkpoint-tmp").mkdir()
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code='28']")


@pytest.mark.parametrize(
    ("place", "name", "failure"), [(ocp, "save", full_underneath), (checkpoint, "write_json", full)]
)
def test_a_full_disk_is_one_line_and_leaves_the_checkpoints_from_before(tmp_path, monkeypatch, place, name, failure):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, epoch, carry(epoch))
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failure)
        with pytest.raises(UserError, match=r"^no space left in \S+ for epoch 3: free some, then use --resume$"):
            checkpoint.save(tmp_path, 3, carry(3))
    assert names(tmp_path) == ["1", "1.json", "2", "2.json"]
    assert numbers(checkpoint.load(tmp_path, shapes(carry(0)))[1]) == numbers(carry(2))


def test_other_failures_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def broken(*arguments, **more):
        raise ValueError("RESOURCE_EXHAUSTED: out of device memory")

    monkeypatch.setattr(ocp, "save", broken)
    with pytest.raises(ValueError, match="device memory"):
        checkpoint.save(tmp_path, 1, carry(1))


@pytest.mark.parametrize("name", ["run[1]", "a*b", "a?b", "a\\b", "hidden=[8,8] ü 50%", "#{x}:~;!", "x" * 255])
def test_any_name_of_a_folder_gives_back_what_was_saved(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    folder.parent.mkdir()
    checkpoint.save(folder, 1, carry(1))
    assert numbers(checkpoint.load(folder, shapes(carry(0)))[1]) == numbers(carry(1))
    assert checkpoint.load(folder, shapes({"agent": carry(0).agent}))[0] == 1
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert numbers(checkpoint.load(Path(moved), shapes(carry(0)))[1]) == numbers(carry(1))


def test_the_first_checkpoint_is_read_back(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ocp, "load", lambda path, expected: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), expected))
        with pytest.raises(UserError, match=r"checkpoints/1 cannot be read back: its numbers differ"):
            checkpoint.save(tmp_path / "checkpoints", 1, {"agent": {"w": jnp.ones(3)}})
        assert checkpoint.epochs(tmp_path / "checkpoints") == []
    checkpoint.save(tmp_path / "checkpoints", 1, {"agent": {"w": jnp.ones(3)}})


READER = """
import sys
from pathlib import Path
from jaxrl.runs.lock import reading
with reading(Path(sys.argv[1])) as text:
    print(len(text), flush=True)
    sys.stdin.readline()
"""


def test_a_checkpoint_that_another_process_reads_is_removed_later(tmp_path):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, epoch, carry(epoch))
    line = [sys.executable, "-c", READER, str(tmp_path / "1.json")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert int(reader.stdout.readline()) > 100
        checkpoint.save(tmp_path, 3, carry(3))
        assert names(tmp_path) == ["1", "1.json", "2", "2.json", "3", "3.json"]
        reader.communicate("\n")
    checkpoint.save(tmp_path, 4, carry(4))
    assert names(tmp_path) == ["3", "3.json", "4", "4.json"]


def test_a_checkpoint_removed_while_it_is_read_gives_way_to_a_newer_one(tmp_path, capsys):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, epoch, carry(epoch))
    harm, seen = checkpoint._harm, []

    def moved_on(folder, epoch, text):
        seen.append(epoch)
        if len(seen) == 1:
            for later in (3, 4):
                checkpoint.save(tmp_path, later, carry(later))
        return harm(folder, epoch, text)

    with mock.patch.object(checkpoint, "_harm", moved_on):
        epoch, loaded = checkpoint.load(tmp_path, shapes(carry(0)))
    assert (epoch, seen, capsys.readouterr().err) == (4, [2, 4], "")
    assert numbers(loaded) == numbers(carry(4))


def test_a_folder_that_refuses_is_named_and_orbax_is_not_asked(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").write_text("a file")
    monkeypatch.setattr(ocp, "save", None)
    with pytest.raises(UserError, match=r"^cannot write \S+/checkpoints/1: File exists$"):
        checkpoint.save(tmp_path / "checkpoints", 1, carry(1))


def test_checksums_are_of_every_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"abc")
    assert checkpoint.checksums(tmp_path) == {
        "a/b": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    }
    checkpoint.save(tmp_path / "c", 1, carry(1))
    recorded = json.loads((tmp_path / "c" / "1.json").read_text())
    assert recorded == checkpoint.checksums(tmp_path / "c" / "1")
