"""Data of the tutorials: ten shops, each of which hands its customers' messages to departments of its own."""

from __future__ import annotations

import random
import sys

sys.path.append("../../recipes")

from datasets import Dataset
from synthetic_data import ITEMS, LABELS, REQUESTS, WISHES

SHOPS = "lamps bikes books tents shoes pianos teas maps kites clocks".split()


def departments(shop: str) -> list[str]:
    """The departments of a shop: three to six, in an order of its own."""
    rng = random.Random(shop)
    return rng.sample(LABELS["intent"], rng.randint(3, 6))


def messages(shop: str, split: str, size: int) -> Dataset:
    """Messages to a shop, with the number of the department that each is for.

    The split `"eval"` asks for the same things in other words.
    """
    rng = random.Random(f"{shop}/{split}")
    names = departments(shop)
    rows = []
    for index in range(size):
        label = index % len(names)
        wish = rng.choice(WISHES[split][names[label]]).format(item=rng.choice(ITEMS[split]))
        rows.append({"text": rng.choice(REQUESTS["train"]).format(wish=wish), "label": label})
    rng.shuffle(rows)
    return Dataset.from_list(rows)
