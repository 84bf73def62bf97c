"""Setting rows apart to evaluate on, with every label on both sides."""

from __future__ import annotations

import random
from collections import defaultdict

from ..errors import TableError
from .examples import Examples
from .problem import Kind, Problem
from .table import Table

# More rows make an evaluation slower and hardly any surer: of 2,000 the standard error of an accuracy is 1 %.
MOST_EVALUATION_ROWS = 2_000
FEWEST_ROWS = 4


def split_rows(
    examples: Examples, problem: Problem, *, table: Table, share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Splits rows into those to train on and those to evaluate on, label by label where rows have one label.

    Args:
        examples ([`Examples`]): The rows.
        problem ([`Problem`]): The task.
        table ([`Table`]): Says where a row is.
        share (`float`): Of the rows, to evaluate on; at most [`MOST_EVALUATION_ROWS`], or one of each label.
        seed (`int`): Of the draw.

    Returns:
        `tuple[list[int], list[int]]`: Row numbers, in the table's order.

    Raises:
        [`TableError`]: There are too few rows, or a label is in one row only.
    """
    count = len(examples)
    if count < FEWEST_ROWS:
        raise TableError(f"{table.name} has {count} rows; training and evaluating takes at least {FEWEST_ROWS}.")
    wanted = min(max(1, round(share * count)), MOST_EVALUATION_ROWS, count - 1)
    draw = random.Random(seed)
    if problem.kind is Kind.CLASSIFICATION:
        groups: dict[int, list[int]] = defaultdict(list)
        for index, label in enumerate(examples.labels):
            groups[label].append(index)
        _refuse_single(groups, problem, table)
        evaluation = _stratified(list(groups.values()), wanted / count, draw)
    else:
        if problem.kind is Kind.MULTI_LABEL:
            _refuse_single(
                {
                    label: [index for index, row in enumerate(examples.labels) if row[label]]
                    for label in range(len(problem.labels))
                },
                problem,
                table,
            )
        evaluation = draw.sample(range(count), wanted)
    apart = set(evaluation)
    return [index for index in range(count) if index not in apart], sorted(apart)


def _stratified(groups: list[list[int]], share: float, draw: random.Random) -> list[int]:
    """The same share of each group, to the row: what is left over by rounding goes to the largest remainders."""
    exact = [share * len(group) for group in groups]
    sizes = [min(max(1, int(size)), len(group) - 1) for size, group in zip(exact, groups)]
    order = sorted(range(len(groups)), key=lambda i: exact[i] - int(exact[i]), reverse=True)
    left = round(sum(exact)) - sum(sizes)
    for index in order[: max(left, 0)]:
        sizes[index] = min(sizes[index] + 1, len(groups[index]) - 1)
    return [index for group, size in zip(groups, sizes) for index in draw.sample(group, size)]


def _refuse_single(groups: dict[int, list[int]], problem: Problem, table: Table) -> None:
    single = [(indices[0], problem.labels[label]) for label, indices in sorted(groups.items()) if len(indices) == 1]
    if single:
        index, name = single[0]
        more = f" ({len(single) - 1:,} more labels are like that)" if len(single) > 1 else ""
        raise TableError(
            f'{table.place(index)}: the label "{name}" is in this row only{more}, so it cannot be both trained on and '
            "evaluated on. Add rows of it, mend it if it is a slip, or give a table of your own with --eval-data."
        )
