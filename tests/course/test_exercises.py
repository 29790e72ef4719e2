"""The check of each exercise, and tests of these checks.

    python -m pytest -m ex3      the check of EXERCISE 3

mistakes.md has right and wrong answers. A check must accept every right answer, and
must turn each wrong one away with the question that fits.
"""

import random
import re

import numpy as np
import pytest
import torch

import data
from tests.conftest import ROOT
from tests.course import classroom, judge
from tests.course.checks import CHECKS, compare

PAGE = (ROOT / "tests/course/mistakes.md").read_text(encoding="utf-8")
# The names that the answers use.
NAMES = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
NAMES.update({"np": np, "random": random, "data": data})


@pytest.mark.parametrize(
    "n", [pytest.param(n, marks=getattr(pytest.mark, f"ex{n}")) for n in range(1, 10)]
)
def test_exercise(n):
    question = judge.verdict(classroom.make_task(ROOT, n, classroom.CHECKS))
    if question != "passed":
        # Without the traceback, which gives half of the answer away.
        pytest.fail(question, pytrace=False)


def define(source):
    """Run the definition of a function, and return the function."""
    namespace = dict(NAMES)
    exec(source, namespace)
    return namespace[re.match(r"def (\w+)", source)[1]]


def read_answers():
    """Read the page: (exercise, answer, the question of the check or "passed")."""
    answers = []
    for section in re.split(r"(?m)^## ", PAGE)[1:]:
        n = int(section[0])
        sources = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        answers += [(n, define(source), "passed") for source in sources]
        for row in re.findall(r"(?m)^\| (`.*) \|$", section):
            cells = re.split(r" (?<!\\)\| ", row)
            old, new, question = [cell.replace(r"\|", "|") for cell in cells]
            old = re.findall("`(.*?)`", old)
            new = re.findall("`(.*?)`", new) or [""]
            source = sources[0]
            for before, after in zip(old, new, strict=True):
                assert source.count(before) == 1, row
                source = source.replace(before, after)
            answers.append((n, define(source), question))
    return answers


ANSWERS = read_answers()


# The ids are numbers: a question may name the bug that somebody hunts.
@pytest.mark.parametrize("k", range(len(ANSWERS)))
def test_a_check_asks_the_question_that_fits_and_accepts_any_style(k):
    n, answer, question = ANSWERS[k]
    check = CHECKS[n - 1]
    if question == "passed":
        check(answer)
    else:
        with pytest.raises(AssertionError) as failure:
            check(answer)
        # If numbers follow, the question has an end.
        first_line, *_ = str(failure.value).split("\n")
        assert first_line in (question, f"{question}.")


def test_the_page_of_mistakes_has_the_names_of_the_exercises():
    names = re.findall(r"(?m)^## (\d)\. `(.*)`$", PAGE)
    found = classroom.EXERCISES.items()
    assert names == [(str(n), name) for n, (_, name, _) in found]
    assert len(ANSWERS) > 130


@pytest.mark.parametrize(
    "actual, expected, message",
    [
        ([0.1234], [2.0], "why.\nYours: [0.123]. Expected: [2.0]"),
        ([True], [0.0], "why.\nYours: [True]. Expected: [False]"),
        ([1.0] * 14 + [7], [1.0] * 15, "why.\nYours at [14]: 7.0. Expected: 1.0"),
        ([1.0], [1.0, 1.0], "why.\nYour shape: (1,). Expected: (2,)"),
        (None, [1.0], "nothing is returned yet: is there a return statement?"),
    ],
)
def test_a_check_that_fails_shows_the_answer_and_the_truth(actual, expected, message):
    with pytest.raises(AssertionError) as failure:
        compare(actual, expected, "why")
    assert str(failure.value) == message


def test_an_error_in_one_of_the_four_files_does_not_fail_the_checks_of_the_others():
    files = "model|data|train|evaluate"
    checks = classroom.CHECKS.read_text(encoding="utf-8")
    assert not re.search(rf"(?m)^(import|from) ({files})\b", checks)
    assert re.search(rf"(?m)^    import ({files})\b", checks)
