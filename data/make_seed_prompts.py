"""Writes seed_prompts.jsonl: English user prompts of eleven kinds, to self-distil a small chat model on.

Each kind has two sources in seed_words/:

- handwritten/<kind>.txt holds one prompt per line. All of them are used.
- templates/<kind>.txt holds blocks of forms and items. Forms and items of a block are paired at random until the kind
  has enough prompts.

A block of templates looks like this. The number says how many forms each item is paired with:

    [block 2]
    ? Explain {0} in simple terms.
    ? What do {0} and {1} have in common?
    first field | second field

A form may name {n} (a number word), {lang} (a language), {name}, {other}, {she}, {She} and {her} (two people). In a
block without items each form is used as often as the number says, and draws its numbers itself:

    ? a=2..9 b=10..50/5 c=a*b :: What is {a} times {b}?

Here a is between 2 and 9, b is a multiple of 5 between 10 and 50, and c is computed. A backslash and an n stand for a
line break in all files.

The result depends only on these files and on the seed. Run it from anywhere:

    python data/make_seed_prompts.py
    python data/make_seed_prompts.py --check data/general_prompts.jsonl TEST_FILE.jsonl ...

Prompts that equal a row of general_prompts.jsonl, or share eight words in a row with one, are dropped. --check counts
the same overlaps with other files and exits with 1 if there are any.
"""

import argparse
import json
import operator
import random
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import median


DATA = Path(__file__).resolve().parent
WORDS = DATA / "seed_words"
SEED = 20
PER_KIND = 350
NGRAM = 8
KINDS = (
    "facts",
    "howto",
    "lists",
    "arithmetic",
    "code",
    "writing",
    "summary",
    "translation",
    "extraction",
    "chat",
    "brainstorm",
)

NUMBERS = ("three", "four", "five", "six", "seven", "eight", "ten")
LANGUAGES = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch")
GIRLS = "Amira Beth Chloe Dana Elif Fiona Greta Hana Irene Jade Kira Lucy Mona Nadia Olga Priya Rita Sonja Tess Yara"
BOYS = (
    "Adam Bruno Carlos David Emil Felix George Hugo Ivan Jonas Karim Leon Mateo Nils Oscar Paul Ravi Samir Theo Yusuf"
)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def read_lines(path):
    """Returns the lines of a word file that are not empty, with real line breaks for every backslash and n."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip().replace("\\n", "\n") for line in lines if line.strip()]


def read_blocks(path):
    """Returns the blocks of a template file as (uses, forms, items). An item is a list of fields."""
    blocks = []
    for line in read_lines(path):
        if header := re.fullmatch(r"\[[\w-]+ (\d+)\]", line):
            blocks.append((int(header[1]), [], []))
        elif line.startswith("? "):
            blocks[-1][1].append(line[2:])
        else:
            blocks[-1][2].append(line.split(" | "))
    for uses, forms, items in blocks:
        if items and uses > len(forms):
            raise ValueError(f"A block of {path.name} has {len(forms)} forms. It needs {uses} for each item.")
    return blocks


def draw_numbers(assignments, rng):
    """Returns a value for each assignment, such as a=2..9, b=10..50/5 or c=a*b. Each may use the ones before it."""
    values = {}
    for assignment in assignments.split():
        variable, rule = assignment.split("=")
        if interval := re.fullmatch(r"(\d+)\.\.(\d+)(?:/(\d+))?", rule):
            low, high, step = (int(number) for number in interval.groups("1"))
            values[variable] = rng.randrange(low, high + 1, step)
        else:
            left, sign, right = re.fullmatch(r"(\w+)([-+*])(\w+)", rule).groups()
            left, right = (int(operand) if operand.isdigit() else values[operand] for operand in (left, right))
            values[variable] = OPERATORS[sign](left, right)
    return values


def draw_words(rng):
    """Returns random words for the named places that a form may have: numbers, languages and two people."""
    girl, boy = rng.choice(GIRLS.split()), rng.choice(BOYS.split())
    words = {"n": rng.choice(NUMBERS), "lang": rng.choice(LANGUAGES)}
    if rng.random() < 0.5:
        return words | {"name": girl, "other": boy, "she": "she", "She": "She", "her": "her"}
    return words | {"name": boy, "other": girl, "she": "he", "She": "He", "her": "his"}


def fill(form, fields, rng):
    """Returns a form with its places filled. Braces in the fields are left alone, as fields may hold code."""
    assignments, separator, text = form.rpartition(" :: ")
    values = draw_words(rng)
    if separator:
        values |= draw_numbers(assignments, rng)
    values |= {str(index): field for index, field in enumerate(fields)}
    text = re.sub(r"\{(\w+)\}", lambda place: str(values[place[1]]), text)
    return text[0].upper() + text[1:]


def templated_prompts(kind, rng):
    """Returns every prompt that the template blocks of a kind yield. All forms of a block are used equally often."""
    prompts = []
    for uses, forms, items in read_blocks(WORDS / "templates" / f"{kind}.txt"):
        rng.shuffle(forms)
        rng.shuffle(items)
        if not items:
            prompts += [fill(form, (), rng) for form in forms for _ in range(uses)]
        for index, item in enumerate(items):
            for turn in range(index * uses, (index + 1) * uses):
                prompts.append(fill(forms[turn % len(forms)], item, rng))
    return prompts


def normalise(text):
    """Returns the words of a text in lower case, without punctuation."""
    return tuple(re.findall(r"\w+", text.lower()))


def ngrams(words):
    """Returns all runs of NGRAM words."""
    return {words[start : start + NGRAM] for start in range(len(words) - NGRAM + 1)}


class References:
    """The texts of a JSONL file that prompts must not repeat. Every string of a row counts as one text."""

    def __init__(self, path):
        self.texts, self.ngrams = set(), set()
        # Not splitlines(): it also splits at separators that may stand inside a JSON string.
        for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
            row = json.loads(line)
            strings = [value for value in row.values() if isinstance(value, str)]
            strings.append(f"{row.get('instruction', '')} {row.get('input', '')}")
            for words in map(normalise, strings):
                self.texts.add(words)
                self.ngrams |= ngrams(words)

    def equals(self, prompt):
        """Whether a text of the file has exactly the words of the prompt."""
        return normalise(prompt) in self.texts

    def overlaps(self, prompt):
        """Whether a text of the file shares NGRAM words in a row with the prompt."""
        return not self.ngrams.isdisjoint(ngrams(normalise(prompt)))


def make_rows():
    """Returns the rows of all kinds in random order, without duplicates and without our own test prompts."""
    tests = References(DATA / "general_prompts.jsonl")
    rows, seen = [], set()

    def add(kind, prompts, limit):
        added = 0
        for prompt in prompts:
            words = normalise(prompt)
            if added == limit or words in seen or tests.equals(prompt) or tests.overlaps(prompt):
                continue
            seen.add(words)
            rows.append({"prompt": prompt, "kind": kind})
            added += 1
        return added

    for kind in KINDS:
        # Each kind has its own generator, so that a change of one kind leaves the others as they are.
        rng = random.Random(f"{SEED} {kind}")
        handwritten = read_lines(WORDS / "handwritten" / f"{kind}.txt")
        templated = templated_prompts(kind, rng)
        rng.shuffle(templated)
        added = add(kind, handwritten, len(handwritten))
        add(kind, templated, PER_KIND - added)
    random.Random(SEED).shuffle(rows)
    return rows


def report(rows):
    """Prints the number of prompts, of hand-written ones and of forms for each kind, and the lengths."""
    prompts = {row["prompt"] for row in rows}
    counts = Counter(row["kind"] for row in rows)
    print(f"{'kind':<12} {'prompts':>7} {'handwritten':>11} {'forms':>5} {'median characters':>17}")
    total = 0
    for kind in KINDS:
        handwritten = sum(line in prompts for line in read_lines(WORDS / "handwritten" / f"{kind}.txt"))
        forms = sum(len(forms) for _, forms, _ in read_blocks(WORDS / "templates" / f"{kind}.txt"))
        length = median(len(row["prompt"]) for row in rows if row["kind"] == kind)
        print(f"{kind:<12} {counts[kind]:>7} {handwritten:>11} {forms:>5} {length:>17.0f}")
        total += handwritten
    print(f"{'all':<12} {len(rows):>7} {total:>11}")
    lengths = sorted(map(len, prompts))
    marks = {
        share: lengths[min(len(lengths) - 1, len(lengths) * share // 100)] for share in (0, 10, 25, 50, 75, 90, 100)
    }
    print("characters by percentile:", ", ".join(f"{share} %: {length}" for share, length in marks.items()))
    print("equal prompts (words in lower case):", len(rows) - len({normalise(row["prompt"]) for row in rows}))


def check(rows, paths):
    """Prints the overlaps with other files. Returns whether there are none."""
    clean = True
    for path in paths:
        references = References(path)
        equal = [row for row in rows if references.equals(row["prompt"])]
        overlapping = [row for row in rows if references.overlaps(row["prompt"])]
        print(f"{path.name}: {len(equal)} equal prompts, {len(overlapping)} share {NGRAM} words in a row")
        for row in equal + overlapping:
            print("   ", row["kind"], repr(row["prompt"][:100]))
        clean = clean and not equal and not overlapping
    return clean


def main():
    """Writes the prompts, reports on them and checks them against other files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", nargs="+", type=Path, default=[], metavar="FILE", help="JSONL files to keep clear of"
    )
    paths = parser.parse_args().check
    rows = make_rows()
    target = DATA / "seed_prompts.jsonl"
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    report(rows)
    print(f"{target.name}: {len(rows)} prompts, {target.stat().st_size:,} bytes")
    if not check(rows, paths):
        sys.exit(1)


if __name__ == "__main__":
    main()
