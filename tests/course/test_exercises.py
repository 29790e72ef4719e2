"""The check of each exercise, and tests of these checks.

    python -m pytest -m ex3      the check of EXERCISE 3

mistakes.md has right and wrong answers, and the question that each wrong one gets.
"""

import random
import re

import numpy as np
import pytest
import torch

import data
import model
from tests.conftest import ROOT
from tests.course import judge
from tests.course.checks import EXERCISES

PAGE = (ROOT / "tests/course/mistakes.md").read_text(encoding="utf-8")
# The names that the answers use.
NAMES = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "np": np}
NAMES |= {"random": random, "data": data, "model": model}


@pytest.mark.parametrize(
    "n", [pytest.param(n, marks=getattr(pytest.mark, f"ex{n}")) for n in EXERCISES]
)
def test_exercise(n):
    question = judge.verdict(n)
    if question != "passed":
        # Without the traceback, which gives half of the answer away.
        pytest.fail(question, pytrace=False)


def read_answers(section):
    """Read a section of the page: (source of an answer, the question or "passed")."""
    sources = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    answers = [(source, "passed") for source in sources]
    for row in re.findall(r"(?m)^\| (`.*) \|$", section):
        cells = re.split(r" (?<!\\)\| ", row)
        old, new, question = [cell.replace(r"\|", "|") for cell in cells]
        source = sources[0]
        new = re.findall("`(.*?)`", new) or [""]
        for before, after in zip(re.findall("`(.*?)`", old), new, strict=True):
            assert source.count(before) == 1, row
            source = source.replace(before, after)
        answers.append((source, question))
    return answers


@pytest.mark.parametrize("n", EXERCISES)
def test_a_check_asks_the_question_that_fits_and_accepts_any_style(n):
    _, name, _, check = EXERCISES[n]
    section = re.split(r"(?m)^## ", PAGE)[n]
    assert section.startswith(f"{n}. `{name}`\n")
    for source, expected in read_answers(section):
        namespace = dict(NAMES)
        exec(source, namespace)
        question = "passed"
        try:
            check(namespace[re.match(r"def (\w+)", source)[1]])
        except Exception as problem:
            question = judge.explain(problem)
        # The numbers of this answer may follow the question.
        assert question.startswith(expected), source
