"""SIGKILL at any moment of a save leaves the old delta or the new one; two processes never mix theirs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import build, randomize_
from peft import get_peft_model
from tuner_tester import fill_

from bitfit_hf import BiasDelta, BitFitConfig

# In a process of its own that forks: starting Python and importing torch for each kill would take minutes. The
# children save and save again, as a training does.
SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from bitfit_hf import BiasDelta

torch.set_num_threads(1)
mode, count, folder, *saved = sys.argv[1:]
deltas = {delta.digest: delta for delta in map(BiasDelta.from_pretrained, saved)}
first, second = deltas.values()
random.seed(0)
start = time.perf_counter()
for delta in (first, second, first):
    delta.save_pretrained(folder)
one_save = (time.perf_counter() - start) / 3

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid

started, starting = os.pipe()

def save_forever():
    os.write(starting, b".")  # on a busy machine a process may be killed before it has begun
    while True:
        second.save_pretrained(folder)
        first.save_pretrained(folder)

def save_often(delta):
    for _ in range(int(count)):
        delta.save_pretrained(folder)

found, interrupted = [], 0
if mode == "kill":
    # How many of the kills hit a save half-way depends on the machine, so they go on until enough have.
    enough = lambda: len(found) >= int(count) and len(set(found)) == 2 and interrupted >= 5
    while not enough() and len(found) < 20 * int(count):
        pid = child(save_forever)
        os.read(started, 1)
        time.sleep(random.uniform(0, 4 * one_save))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left = [path for path in Path(folder).iterdir() if path.name.startswith(".")]
        interrupted += bool(left)
        found.append(BiasDelta.from_pretrained(folder).digest)
        for path in left:
            if "pending" not in path.name:
                path.unlink()
else:
    pids = {child(lambda: save_often(first)), child(lambda: save_often(second))}
    while pids:
        found.append(BiasDelta.from_pretrained(folder).digest)
        pid, _ = os.waitpid(-1, os.WNOHANG)
        pids.discard(pid)
assert set(found) <= set(deltas)
print(json.dumps({"found": found, "interrupted": interrupted}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[str]:
    """Two deltas of the same task, large enough for writing them to take a moment."""
    folders = []
    for seed in (1, 2):
        model = fill_(get_peft_model(randomize_(build("bert-sequence")), BitFitConfig()), seed=seed)
        folder = tmp_path_factory.mktemp(f"delta{seed}")
        BiasDelta.from_model(model).save_pretrained(folder)
        folders.append(str(folder))
    return folders


def run(mode: str, count: int, folder: Path, saved: list[str]) -> dict:
    command = [sys.executable, "-c", SCRIPT, mode, str(count), str(folder), *saved]
    result = subprocess.run(command, check=True, timeout=500, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no fork")
@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments(kills, tmp_path, saved):
    answer = run("kill", kills, tmp_path / "folder", saved)
    assert len(answer["found"]) >= kills
    assert set(answer["found"]) == {BiasDelta.from_pretrained(folder).digest for folder in saved}, "both were there"
    assert answer["interrupted"] >= 5, "kills that hit a save half-way"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_two_processes_and_a_reader(tmp_path, saved):
    answer = run("race", 40, tmp_path / "folder", saved)
    assert len(answer["found"]) >= 5
    assert not [path for path in (tmp_path / "folder").iterdir() if path.name.startswith(".")]
