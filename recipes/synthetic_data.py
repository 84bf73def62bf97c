"""Two small text classification tasks that are generated, not collected: `stance` and `intent`.

They exist so that a recipe or a test can train on text with a real signal without a download. No row is taken from a
data set; every text is put together from the word lists below by a seeded generator, the same on every machine.

- `stance`: what a review amounts to: `negative`, `mixed` or `positive`. A review may praise and criticise, and any
  statement may be turned round by a negation ("nothing awful about the view"). So the words alone say little: a model
  has to read the negation, and which of two statements the author gives the weight.
- `intent`: which of six things a customer asks for. Each message also mentions one or two of the other five (done
  already, not wanted, somebody else's), in the same words in which another customer asks for them.

The evaluation split is about other products, in other adjectives and other wordings of the requests, and has some
sentence patterns that training never shows. So what is measured is reading, with help from the pre-trained model, not
recall.

    python recipes/synthetic_data.py --task intent --split train --size 5
"""

from __future__ import annotations

import argparse
import json
import random

SPLITS = ("train", "eval")

LABELS: dict[str, tuple[str, ...]] = {
    "stance": ("negative", "mixed", "positive"),
    "intent": ("refund", "cancel", "address", "tracking", "password", "invoice"),
}

# --- stance ---

PRODUCTS = {
    "train": {
        "phone": ["screen", "battery", "camera", "loudspeaker", "charger", "keyboard"],
        "hotel": ["room", "bed", "breakfast", "pool", "front desk", "view", "bathroom"],
        "restaurant": ["soup", "service", "wine list", "dessert", "terrace", "bread"],
        "vacuum cleaner": ["motor", "hose", "filter", "cable", "brush"],
        "novel": ["plot", "ending", "narrator", "first chapter", "dialogue", "cover"],
        "bicycle": ["saddle", "frame", "gear shift", "bell", "front brake"],
        "language course": ["teacher", "textbook", "homework", "classroom", "exam"],
        "coffee machine": ["grinder", "water tank", "display", "milk frother", "espresso"],
    },
    "eval": {
        "tent": ["zip", "groundsheet", "inner lining", "porch", "carry bag"],
        "pair of headphones": ["sound", "headband", "microphone", "carrying case", "noise filter"],
        "museum": ["audio guide", "gift shop", "garden", "main exhibition", "ticket office"],
        "ferry": ["cabin", "canteen", "upper deck", "crew", "boarding"],
        "mapping app": ["menu", "route planner", "offline mode", "search", "help page"],
    },
}

ADJECTIVES = {
    "train": {
        "positive": "great excellent wonderful lovely impressive superb delightful outstanding fantastic good".split(),
        "negative": "awful terrible poor disappointing dreadful useless horrible miserable lousy bad".split(),
    },
    "eval": {
        "positive": "terrific amazing perfect beautiful splendid pleasant charming magnificent".split(),
        "negative": "nasty pathetic ugly worthless unpleasant annoying inferior mediocre".split(),
    },
}

# A statement says its adjective, or (this often) the opposite of it.
NEGATION_RATE = 0.25
DIRECT = {
    "train": [
        "the {aspect} is {adjective}",
        "the {aspect} turned out {adjective}",
        "I found the {aspect} {adjective}",
        "everyone at home calls the {aspect} {adjective}",
        "the {aspect} was {adjective} from the first day",
        "there is something {adjective} about the {aspect}",
    ],
    "eval": ["the {aspect} proved {adjective}", "the {aspect} has been {adjective} all along"],
}
NEGATED = {
    "train": [
        "the {aspect} is not {adjective} at all",
        "the {aspect} is anything but {adjective}",
        "the {aspect} was never {adjective}",
        "nobody could call the {aspect} {adjective}",
        "I would not call the {aspect} {adjective}",
        "there is nothing {adjective} about the {aspect}",
    ],
    "eval": ["the {aspect} is far from {adjective}", "the {aspect} is by no means {adjective}"],
}

# Both statements say the same.
AGREEING = {
    "train": [
        "{main}.",
        "{main}, and {second}.",
        "{main}. Also, {second}.",
        "Not only do I find that {main}: {second} too.",
    ],
    "eval": ["{main}, just as {second}."],
}
# {main} is the statement that decides; {aside} says the opposite.
WEIGHED = {
    "train": [
        "{aside}, but {main}, and that is what counts.",
        "Although {aside}, {main}, and that settles it.",
        "Yes, {aside}. Still, {main}, which matters far more.",
        "What counts is that {main}, even if {aside}.",
        "{main}. That {aside} hardly matters.",
    ],
    "eval": ["While {aside}, {main}, and only that is important to us."],
}
UNDECIDED = {
    "train": [
        "{main}, but {aside}, so I am torn.",
        "Although {main}, {aside}, and neither outweighs the other.",
        "Yes, {main}. Still, {aside}, which matters just as much.",
        "{main}. That {aside} makes it even.",
    ],
    "eval": ["While {main}, {aside}, and both weigh the same."],
}
REVIEW_OPENINGS = {
    "train": [
        "",
        "About this {product}:",
        "Our second {product} in three years.",
        "My neighbour recommended this {product}.",
        "We compared it with another {product}.",
        "I had this {product} in mind for months.",
    ],
    "eval": ["", "A few words on the {product}.", "First time with this {product}."],
}


def _statement(rng: random.Random, split: str, aspect: str, polarity: str) -> str:
    """One statement about `aspect` that amounts to `polarity`, with an adjective of either polarity."""
    negate = rng.random() < NEGATION_RATE
    pool = NEGATED["train"] + NEGATED[split] if negate else DIRECT["train"] + DIRECT[split]
    opposite = {"positive": "negative", "negative": "positive"}
    adjective = rng.choice(ADJECTIVES[split][opposite[polarity] if negate else polarity])
    return rng.choice(pool).format(aspect=aspect, adjective=adjective)


def _stance(rng: random.Random, split: str, label: str) -> str:
    product = rng.choice(sorted(PRODUCTS[split]))
    aspects = rng.sample(PRODUCTS[split][product], 3)
    opposite = {"positive": "negative", "negative": "positive"}
    main = rng.choice(["negative", "positive"]) if label == "mixed" else label
    statements = {
        "main": _statement(rng, split, aspects[0], main),
        "second": _statement(rng, split, aspects[1], main),
        "aside": _statement(rng, split, aspects[2], opposite[main]),
    }
    patterns = UNDECIDED if label == "mixed" else rng.choice([AGREEING, WEIGHED])
    body = rng.choice(patterns["train"] + patterns[split]).format(**statements)
    return _sentences([rng.choice(REVIEW_OPENINGS["train"] + REVIEW_OPENINGS[split]).format(product=product), body])


# --- intent ---

WISHES = {
    "train": {
        "refund": ["get my money back", "be refunded for the {item}", "have the payment for the {item} returned"],
        "cancel": ["cancel my subscription", "end the monthly plan", "stop the contract for the {item}"],
        "address": [
            "change the delivery address",
            "have the {item} sent to my office instead",
            "update the street you ship to",
        ],
        "tracking": ["find out where the {item} is", "see when my parcel arrives", "track the shipment of the {item}"],
        "password": ["reset my password", "get back into my locked account", "choose a new login code"],
        "invoice": ["get a copy of the invoice", "receive the bill for the {item} as a PDF", "download my receipt"],
    },
    "eval": {
        "refund": ["be paid back for the {item}", "have the amount credited to my card again"],
        "cancel": ["terminate my membership", "quit the yearly plan for the {item}"],
        "address": ["redirect the {item} to my new flat", "correct the house number on the order"],
        "tracking": ["know how far the {item} has travelled", "learn which day the package will come"],
        "password": ["recover my login", "set another password"],
        "invoice": ["obtain the invoice for the {item}", "have the bill mailed to my accountant"],
    },
}
ITEMS = {
    "train": "blender lamp jacket printer kettle backpack monitor toaster desk drill".split(),
    "eval": "armchair scarf router bookshelf teapot".split(),
}
REQUESTS = {
    "train": [
        "Please help me {wish}.",
        "I would like to {wish}.",
        "Could you let me {wish}?",
        "How do I {wish}?",
        "I need to {wish} this week.",
        "My question today is how to {wish}.",
    ],
    "eval": ["What do I have to do to {wish}?", "I am writing because I want to {wish}."],
}
MENTIONS = {
    "train": [
        "I do not want to {wish}.",
        "Last week you helped me {wish}, thank you.",
        "My sister had to {wish}, but she has written to you herself.",
        "There is no need to {wish} any more.",
        "I already know how to {wish}.",
        "Your last answer was about how to {wish}, which I never asked.",
        "In March I wanted to {wish}; that is done.",
    ],
    "eval": ["It is not that I wish to {wish}.", "A colleague managed to {wish} on her own."],
}
GREETINGS = {
    "train": ["", "Hello,", "Good morning.", "Dear team,", "Customer since {year}.", "Order {number}."],
    "eval": ["", "Hi there,", "To whom it may concern:", "Reference {number}."],
}


def _intent(rng: random.Random, split: str, label: str) -> str:
    def fill(patterns: dict[str, list[str]], intent: str) -> str:
        wish = rng.choice(WISHES[split][intent]).format(item=rng.choice(ITEMS[split]))
        return rng.choice(patterns["train"] + patterns[split]).format(wish=wish)

    others = rng.sample([intent for intent in LABELS["intent"] if intent != label], rng.choice([1, 1, 2]))
    sentences = [fill(REQUESTS, label), *(fill(MENTIONS, other) for other in others)]
    rng.shuffle(sentences)
    greeting = rng.choice(GREETINGS[split]).format(year=rng.randint(2009, 2024), number=rng.randint(10000, 99999))
    return _sentences([greeting, *sentences])


# --- interface ---

_GENERATORS = {"stance": _stance, "intent": _intent}


def _sentences(parts: list[str]) -> str:
    return " ".join(part[0].upper() + part[1:] for part in parts if part)


def generate(task: str, split: str, size: int, seed: int = 0) -> list[dict[str, str]]:
    """
    Generates one split of one task: the labels equally often (to within one), every text once, in random order.

    Args:
        task (`str`): `"stance"` or `"intent"`.
        split (`str`): `"train"` or `"eval"`.
        size (`int`): Number of rows.
        seed (`int`, *optional*, defaults to 0): Same arguments, same rows, on every machine.

    Returns:
        `list[dict[str, str]]`: Rows with the columns `text` and `label` (a name out of `LABELS[task]`).

    Raises:
        `ValueError`: If the task or the split does not exist.
    """
    if task not in LABELS or split not in SPLITS:
        raise ValueError(f"There is no {split!r} split of {task!r}: tasks are {list(LABELS)}, splits {list(SPLITS)}.")
    # A string seed is hashed with SHA-512: the same in every process, and different for each task and split.
    rng = random.Random(f"{task}/{split}/{seed}")
    rows: dict[str, str] = {}
    while len(rows) < size:
        label = LABELS[task][len(rows) % len(LABELS[task])]
        rows.setdefault(_GENERATORS[task](rng, split, label), label)
    shuffled = [{"text": text, "label": label} for text, label in rows.items()]
    rng.shuffle(shuffled)
    return shuffled


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints rows of a generated task as JSON lines.")
    parser.add_argument("--task", choices=list(LABELS), default="stance")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--size", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for row in generate(args.task, args.split, args.size, args.seed):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
