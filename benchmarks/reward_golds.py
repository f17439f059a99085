"""Does the mathematics reward accept a data set's own answers however they are wrapped, and refuse others near them?

    python benchmarks/reward_golds.py path/to/gsm8k/test.jsonl

The file is JSON lines with a column `answer` whose last line is `#### <integer>`, as GSM8K has it. Every gold answer is
put into every wrapping and must score 1; so are perturbed ones, which must score 0. Last, how many different
completions a second one core scores, by the kind of answer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rewards.math import Extract, accuracy

WRAPPINGS: dict[str, tuple[Extract, str]] = {  # name: policy, text
    "\\boxed{g}": ("auto", "So the result is \\boxed{{{}}}."),
    "\\boxed{\\$g}": ("auto", "They pay \\boxed{{\\${}}}."),
    "\\boxed{g\\text{ apples}}": ("auto", "That leaves \\boxed{{{}\\text{{ apples}}}} in all."),
    "#### g": ("auto", "3 + 4 = 7 and so on.\n#### {}"),
    "#### $g": ("auto", "3 + 4 = 7 and so on.\n#### ${}"),
    "The answer is g.": ("auto", "Of 12 there are 3 left. The answer is {}."),
    "The answer is $g.": ("auto", "Of 12 there are 3 left. The answer is ${}."),
    "**g**": ("auto", "Of 12 there are 3 left.\n\n**Answer: {}**"),
    "... = g": ("auto", "Adding 12 and the rest gives 12 + x = {}"),
    "g dollars.": ("last_number", "Of 12 there are 3 left, which cost {} dollars."),
    "<answer>g</answer>": ("answer_tag", "<think>12?</think><answer>{}</answer>"),
}
PERTURBED: dict[str, Callable[[int], int]] = {
    "g": lambda g: g,
    "g + 1": lambda g: g + 1,
    "g - 1": lambda g: g - 1,
    "-g": lambda g: -g,
    "10g": lambda g: 10 * g,
    "a digit changed": lambda g: int(str(g)[:-1] + str((int(str(g)[-1]) + 5) % 10)),
}
ANSWERS: dict[str, tuple[str, str]] = {  # name: gold, answer, both of a number that makes them differ
    "integers": ("{n}", "{n}"),
    "fractions": ("\\frac{{{n}}}{{7}}", "{n}/7"),
    "decimals": ("{n}.5", "{n}\\frac12"),
    "units": ("{n} \\text{{ cm}}", "{n}\\,\\mathrm{{cm}}"),
    "radicals": ("\\frac{{{n}\\sqrt{{3}}}}{{2}}", "{n}\\frac{{\\sqrt3}}{{2}}"),
    "intervals": ("[0,{n})\\cup(10000,\\infty)", "(10000,\\infty)\\cup[0,{n})"),
    "polynomials": ("x^2+{n}x+1", "1+{n}x+x^2"),
    "equations": ("y=2x+{n}", "y={n}+2x"),
}


def spellings(number: int) -> set[str]:
    return {str(number), f"{number:,}", f"{number}.00"}


def agreement(golds: list[int]) -> Table:
    table = Table("wrapping", *PERTURBED)
    for name, (policy, text) in WRAPPINGS.items():
        cells = []
        for perturb in PERTURBED.values():
            right = total = 0
            for gold in golds:
                number = perturb(gold)
                texts = sorted(text.format(spelling) for spelling in spellings(number))
                scores = accuracy(texts, [f"{gold:,}"] * len(texts), extract=policy)
                right += sum(score == float(number == gold) for score in scores)
                total += len(texts)
            cells.append(f"{right}/{total}")
        table.add_row(name, *cells)
    return table


def speed(count: int) -> Table:
    """Of completions that all differ, so that no cache helps."""
    table = Table("answers", "completions/s, scored", "with the column `extracted`")
    reasoning = "We have $a = 3$ and $b = 4$, so that the total is 3 + 4 = 7 of 12. " * 20
    for name, (gold, answer) in ANSWERS.items():
        cells = []
        for offset, log in ((0, None), (10 * count, lambda column, values: None)):
            numbers = range(1000 + offset, 1000 + offset + count)
            texts = [f"{reasoning}\nSo it is $\\boxed{{{answer.format(n=n)}}}$." for n in numbers]
            golds = [gold.format(n=n) for n in numbers]
            accuracy(texts[:1], golds[:1], log_extra=log)
            started = time.perf_counter()
            scores = accuracy(texts[1:], golds[1:], log_extra=log)
            cells.append(f"{len(scores) / (time.perf_counter() - started):,.0f}")
            if scores.count(1.0) != len(scores):
                raise SystemExit(f"{name}: {scores.count(1.0)} of {len(scores)} are right")
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="JSON lines with a column `answer`")
    parser.add_argument("--count", type=int, default=500, help="completions of each kind that are timed")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.path.read_text().splitlines()]
    golds = [int(row["answer"].rpartition("####")[2].replace(",", "")) for row in rows]
    console = Console(width=120)
    console.print(f"{len(golds)} gold answers, each in every spelling ({', '.join(sorted(spellings(1234)))})")
    console.print(agreement(golds), speed(arguments.count))


if __name__ == "__main__":
    main()
