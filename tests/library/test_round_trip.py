"""One verdict: every kind of delta, made and saved in every way, is loaded by every way, and is the same everywhere.

The cells of this matrix are task × way of making × way of saving × way of loading; `round_trip_tester` has the ways,
`round_trip_tasks` the tasks. What the ways of saving write is compared first. Where it is equal, no way of loading can
tell one from the other: so of the ways of loading every other one is tried on one saving of a case, and the others
on the next case, which tries every pair of two ways, and a way and a task. The slow test tries every cell by itself.

What is damaged, or belongs to another base, is refused by every way.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers
from architectures import HIDDEN
from hub_deltas import make_tokenizer
from hub_fixtures import hub_client_env
from hub_server import LoopbackHub
from packaging.version import Version
from round_trip_tasks import TASKS, put_bases
from round_trip_tester import (
    LOADINGS,
    MAKINGS,
    NOTES,
    SAVINGS,
    TASKS_WITH_ANSWERS,
    CommandFailed,
    Loaded,
    Made,
    Place,
    ask,
    cells,
    labels_of,
    loadings,
    makings,
    save,
    savings,
)
from test_corrupt import BROKEN, Breaking, edit
from transformers import pipeline
from tuner_tester import add_by_hand, distance, same_tensors

from bitfit_hf import BitFitError
from bitfit_hf.terms.structure import stock_root

TOLERANCE = 2e-6  # between outputs of models that were loaded separately
CASES = [(name, making) for name, task in TASKS.items() for making in makings(task)]


def test_the_size_of_the_matrix() -> None:
    assert (len(TASKS), len(MAKINGS), len(SAVINGS), len(LOADINGS)) == (18, 6, 7, 12)
    assert len(CASES) == 18 * 6 - 4  # PEFT has no name for four of the tasks
    found = list(cells())
    assert len(found) == len(set(found)) == 6423
    tried = Counter(pair for case in range(len(CASES)) for pair in some(case))
    assert set(tried) == {(saving, loading) for _, _, saving, loading in found}
    assert len(tried) == 7 * 10 + 2
    assert min(tried.values()) >= 3
    for part in (0, 1):  # task and making
        with_loading = {(CASES[case][part], loading) for case in range(len(CASES)) for _, loading in some(case)}
        assert with_loading == {(cell[part], cell[3]) for cell in found}


@pytest.fixture(scope="module")
def hub_of_bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """The Hub of all tests here, which this process is redirected to, with the bases of all tasks."""
    home = tmp_path_factory.mktemp("home")
    with LoopbackHub() as hub, hub_client_env(hub, home) as env:
        hub.create_user("alice")
        env.login("alice")
        put_bases(hub)
        # A picture for the card, and compiling the card's template each time, take longer than all the rest.
        env.monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        env.monkeypatch.setattr(jinja2.Environment, "compile", compile_once())
        yield hub


def compile_once() -> Callable[..., Any]:
    """Jinja's compiler with a memory."""
    genuine, compiled = jinja2.Environment.compile, {}

    def compile(self: jinja2.Environment, source: str, *args: Any, **kwargs: Any) -> Any:
        if source not in compiled:
            compiled[source] = genuine(self, source, *args, **kwargs)
        return compiled[source]

    return compile


def some(case: int) -> list[tuple[str, str]]:
    """For every other way of loading one saving; both are others for the next case."""
    name, making = CASES[case]
    first = list(TASKS).index(name) + list(MAKINGS).index(making)
    chosen = []
    for number, loading in enumerate(LOADINGS):
        able = [saving for saving in savings(making) if loading in loadings(TASKS[name], saving)]
        if able and (first + number) % 2 == 0:
            chosen.append((able[(case + number) // 2 % len(able)], loading))
    return chosen


def the_others(case: int) -> list[tuple[str, str]]:
    """All other savings and ways of loading: with [`some`] every cell is filled, and none twice."""
    (name, making), done = CASES[case], some(case)
    every = [(saving, loading) for saving in savings(making) for loading in loadings(TASKS[name], saving)]
    return [pair for pair in every if pair not in done]


EACH_CASE = pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])


@EACH_CASE
def test_one_verdict(case: int, hub_of_bases: LoopbackHub, tmp_path: Path) -> None:
    check(*CASES[case], some(case), hub_of_bases, tmp_path)


@pytest.mark.slow
@EACH_CASE
def test_one_verdict_in_every_cell(case: int, hub_of_bases: LoopbackHub, tmp_path: Path) -> None:
    pairs = the_others(case)
    assert len(pairs) > len(some(case))
    check(*CASES[case], pairs, hub_of_bases, tmp_path)


def check(name: str, making: str, pairs: list[tuple[str, str]], hub: LoopbackHub, tmp_path: Path) -> None:
    """Makes a delta, saves it in every way, and loads it in these ways; all that differs is named in one go."""
    task = TASKS[name]
    made = MAKINGS[making](task, tmp_path / "run")
    repo_id = f"alice/{CASES.index((name, making))}-{len(pairs)}"
    places = {
        saving: save(saving, made, tmp_path / f"saved-{number}", f"{repo_id}-{number}", hub)
        for number, saving in enumerate(savings(making))
    }
    wanted = expected(made)
    problems = [f"{saving}: {text}" for saving, place in places.items() for text in odd_files(place, places, wanted)]
    for number, (saving, loading) in enumerate(pairs):
        if loading == "stock/ by AutoModelFor…" and Version(transformers.__version__) < Version("5.18"):
            continue  # it answers with an untuned model
        try:
            loaded = LOADINGS[loading](task, places[saving].source, tmp_path / f"loaded-{number}")
        except Exception as error:  # a verdict too, whatever its class: all of them are wanted, not the first
            problems.append(f"{saving}, {loading}: {type(error).__name__}: {error}"[:400])
        else:
            problems.extend(f"{saving}, {loading}: {text}" for text in disagreements(loaded, wanted))
    assert not problems, "\n".join(problems)


def expected(made: Made) -> Loaded:
    """What every way of loading should give: what the tuned model is before it is saved."""
    task = made.task
    tensors = made.tensors
    biases = sum(tensor.numel() for name, tensor in tensors.items() if "bitfit_bias" in name)
    rows = task.new_tokens * HIDDEN
    answers = None
    if task.tag in TASKS_WITH_ANSWERS:
        answers = ask(task, pipeline(task.tag, model=stock_root(made.model), tokenizer=make_tokenizer()))
    return Loaded(
        outputs=task.outputs(made.model),
        labels=labels_of(made.model),
        tensors=tensors,
        # Where the vocabulary grows, the outputs have to do.
        weights=None if task.new_tokens else add_by_hand(task.load(), tensors).state_dict(),
        answers=answers,
        sizes=(biases, sum(tensor.numel() for tensor in tensors.values()) - biases - rows),
    )


def odd_files(place: Place, places: dict[str, Place], wanted: Loaded) -> Iterator[str]:
    """How the two files of a saving differ from the tuned model, and from those of the other savings."""
    if not same_tensors(place.tensors, wanted.tensors or {}):
        yield "its tensors are not those of the model"
    first = next(iter(places.values())).config
    for field in sorted({*first, *place.config} - NOTES):
        if first.get(field) != place.config.get(field):
            yield f"its {field} is {place.config.get(field)!r:.80}, that of other savings {first.get(field)!r:.80}"


def disagreements(loaded: Loaded, wanted: Loaded) -> Iterator[str]:
    """In what that which was loaded is not that which was saved."""
    if loaded.outputs is not None and not distance(loaded.outputs, wanted.outputs or []) <= TOLERANCE:
        yield f"its outputs differ by {distance(loaded.outputs, wanted.outputs or []):.1e}"
    if loaded.answers is not None and loaded.answers != pytest.approx(wanted.answers, abs=1e-5):
        yield f"it answers {loaded.answers}, the tuned model {wanted.answers}"
    for field in ("labels", "sizes"):
        if getattr(loaded, field) not in (None, getattr(wanted, field)):
            yield f"its {field} are {getattr(loaded, field)}, those of the tuned model {getattr(wanted, field)}"
    for field in ("tensors", "weights"):
        found, right = getattr(loaded, field), getattr(wanted, field)
        if found is not None and right is not None and not same_tensors(found, right):
            yield f"its {field} are others"


# What is refused -----------------------------------------------------------------------------------------------------

# One of each kind of damage; the slow test has all.
SOME_DAMAGE = (
    "weights: cut in the data",
    "weights: one byte of the data",
    "weights: only a pickle",
    "tensors: one delta missing",
    "tensors: the head missing",
    "tensors: one that nobody knows",
    "tensors: base weights",
    "tensors: NaN",
    "tensors: float16",
    "tensors: of another save",
    "config: cut",
    "value: an unknown term",
    "value: labels that do not add up",
    "value: a head of something else",
    "layout: missing",
    "layout: an unknown term",
    "layout: one too many",
    "fingerprint: of another base",
)
INCONSISTENT: dict[str, Breaking] = {
    "value: terms other than those in the file": edit(bias_terms="query"),
    "value: modules that match nothing": edit(target_modules=["nothing"]),
}
DAMAGE: dict[str, Breaking] = {name: breaking for name, (breaking, _, _) in BROKEN.items()} | INCONSISTENT
del DAMAGE["config: of LoRA"]  # the stock ways load LoRA
# What shows only where there is a base, which `bitfit inspect` looks at none of.
SHOWN_BY_THE_BASE = {
    *(name for name in DAMAGE if name.startswith("fingerprint: ")),
    *INCONSISTENT,
    "tensors: a head of another width",
    "tensors: a head whose bias is missing",
    "layout: a module that does not exist",
    "layout: a name with ..",
    "layout: an absolute name",
    "layout: a weight in place of a bias",
    "layout: an attribute that is no parameter",
}
LOADINGS_OF_A_FOLDER = [name for name in LOADINGS if not name.startswith("stock/")]


@pytest.fixture(scope="module")
def good(hub_of_bases: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta that every way loads."""
    made = MAKINGS["callback"](TASKS["three labels"], tmp_path_factory.mktemp("run"))
    folder = tmp_path_factory.mktemp("good")
    made.value.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "damage",
    [name if name in (*SOME_DAMAGE, *INCONSISTENT) else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGE],
)
def test_what_one_way_refuses_all_refuse(
    damage: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a pickle would leave its trace
    accepted = []
    for number, loading in enumerate(LOADINGS_OF_A_FOLDER):
        folder = Path(shutil.copytree(good, tmp_path / f"damaged-{number}"))
        DAMAGE[damage](folder)
        try:
            LOADINGS[loading](TASKS["three labels"], str(folder), tmp_path / f"loaded-{number}")
        except (BitFitError, CommandFailed, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        accepted.append(loading)
    assert set(accepted) <= ({"bitfit inspect"} if damage in SHOWN_BY_THE_BASE else set())
    assert not Path("unpickled").exists()


def test_the_number_of_damages() -> None:
    assert set(SOME_DAMAGE) <= set(DAMAGE)
    assert len(DAMAGE) == len(BROKEN) - 1 + 2
    assert not SHOWN_BY_THE_BASE - set(DAMAGE)
