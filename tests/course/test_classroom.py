"""A student's copy without answers, its verdicts, the teacher's key, and the hunts."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.course import classroom, hunts
from tests.course.checks import EXERCISES
from tests.course.classroom import read


def test_a_copy_has_nine_empty_bodies_and_no_answer(tmp_path):
    copy = tmp_path / "copy"
    classroom.student(copy)
    names = {path.name for path in copy.rglob("*")}
    assert not names & {"answers.rot13", "bugs.rot13", "mistakes.md", "hunts.py"}
    assert not [name for name in names if name.startswith("test_")]
    everything = "\n".join(read(path) for path in copy.rglob("*.*"))
    for number, (file, name, *_) in EXERCISES.items():
        message = f'("exercise {number}, {name}, is yours to write first")'
        assert read(copy / file).count(message) == 1
        body = classroom.body_of(number).split("\n")
        lines = [line.partition("#")[0].strip() for line in body]
        assert max(lines, key=len) not in everything
    # All docstrings and tags stay.
    for name in classroom.FILES:
        for pattern in (r'(?s)""".*?"""', r"\[[ADE]\d+\]"):
            found = set(re.findall(pattern, read(copy / name)))
            assert found == set(re.findall(pattern, read(name)))
    assert "row sums" in read(copy / "tests/course/first_hour.txt")
    page = read(copy / "tests/course/README.md")
    assert "## Exercises" in page
    assert "## For teachers" not in page
    with pytest.raises(SystemExit, match="not empty"):
        classroom.student(copy)


# A small project without torch. An answer is right if it returns 42. What it calls is
# that of the project, because that of the copy may be wrong.
CHECKS = """
def check(answer):
    assert answer() == 42, "is it 42?"

EXERCISES = {5: ("model.py", "TransformerBlock.forward", 35, check)}
"""
COPY = """
import os, sys
def cross_modal_attention(): return 0
class TransformerBlock:
    def forward():
        BODY
"""
# Bodies, with what their verdicts begin with.
BODIES = {
    "return cross_modal_attention()": "passed",
    "print('passed'); return 41": "is it 42?",
    "raise AssertionError('passed')": "it stops with AssertionError in line 6 of model",
    "sys.exit('passed')": "it stops with SystemExit in line 6 of model.py: passed",
    "raise SystemExit('exercise 5 is yours to write first')": "exercise 5 is yours",
    "os._exit(0)": "Python ends before",
    "raise ValueError('|\\n\\ud800' + 1000 * 'x')": "it stops with ValueError",
    "while True: pass": "it does not end",
    "return 42\ndef (": "it stops with SyntaxError: ",
}


@pytest.mark.parametrize("body", BODIES)
def test_an_answer_has_the_verdict_that_it_deserves(body, tmp_path, monkeypatch):
    project = tmp_path / "project"
    course = project / classroom.COURSE
    course.mkdir(parents=True)
    shutil.copy(ROOT / classroom.COURSE / "judge.py", course)
    (course / "checks.py").write_text(CHECKS)
    (project / "model.py").write_text("def cross_modal_attention(): return 42")
    monkeypatch.setattr(classroom, "ROOT", project)
    (tmp_path / "model.py").write_text(COPY.replace("BODY", body))
    seconds = 0.3 if "while" in body else 60
    sentence = classroom.verdict(tmp_path, 5, seconds)
    assert sentence.startswith(BODIES[body])
    assert len(sentence) <= 500
    assert not re.search(r"[|\n\ud800]", sentence)


def test_the_table_has_the_points_of_every_copy(monkeypatch, tmp_path, capsys):
    def verdict(folder, number):
        return "passed" if folder.name == "good" or number in (2, 6) else "why?"

    monkeypatch.setattr(classroom, "verdict", verdict)
    good, bad, table = [tmp_path / name for name in ("good", "bad", "points.csv")]
    good.mkdir()
    bad.mkdir()
    assert not classroom.check([bad, good], range(1, 10), table)
    out = capsys.readouterr().out
    assert "| 1 | masked_mean | 0 of 3 | why? |" in out
    assert "8 of 46 points" in out
    assert table.read_text().split() == [
        "copy,1,2,3,4,5,6,7,8,9,points",
        f"{bad},0,6,0,0,0,2,0,0,0,8",
        f"{good},3,6,3,5,7,2,6,6,8,46",
    ]
    assert classroom.check([bad], [2, 6])
    with pytest.raises(SystemExit, match="there is no folder"):
        classroom.check([tmp_path / "x"], [1])


def test_the_key_has_all_answers(tmp_path):
    classroom.key(tmp_path / "key.md")
    key = read(tmp_path / "key.md")
    found = re.findall(r"(?m)^\*\*\d\. `([\w.]+)`", key)
    assert found == [name for _, name, *_ in EXERCISES.values()]
    assert classroom.body_of(9) in key
    # The question of every sitting has an answer.
    questions = re.findall(r"(?m)^(\d)\. \(\d\) ", read("tests/course/README.md"))
    assert questions == sorted(set(re.findall(r"\*\*(\d)a\. ", key))) == [*"012345"]


# Somebody may be hunting now. Then these tests must not name any bug.
hunting = pytest.mark.skipif(bool(hunts.hidden()), reason="a bug is hidden")
NUMBERS = range(1, 13)


@pytest.fixture
def project(tmp_path):
    """A copy of the four files."""
    for name in classroom.FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@hunting
@pytest.mark.parametrize("number", NUMBERS)
def test_a_bug_can_be_hidden_and_revealed(number, project, capsys):
    for name in ("cache/tiny", "runs/toy/mmt", "runs/iemocap/mmt"):
        (project / name).mkdir(parents=True)
    hunts.hide(number, project)
    # What other code has made is deleted.
    assert not (project / "cache").exists()
    assert [path.name for path in (project / "runs").iterdir()] == ["iemocap"]
    for name in classroom.FILES:
        compile(read(project / name), name, "exec")
    with pytest.raises(SystemExit, match="There is a bug in the code already"):
        hunts.hide(1, project)
    hunts.reveal(project)
    assert all(read(project / name) == read(name) for name in classroom.FILES)
    with pytest.raises(SystemExit, match="None of these bugs"):
        hunts.reveal(project)
    fault, (report, _) = list(hunts.BUGS.items())[number - 1]
    reported, _, named = capsys.readouterr().out.splitlines()
    assert reported == f"A user reports: {report}"
    assert named.startswith(f"It was: {fault}.")


@hunting
@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_bug_trains_and_a_test_fails(number, project):
    shutil.copy(ROOT / "README.md", project)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", project / "tests", ignore=ignored)
    hunts.hide(number, project)

    train = "train.py --fusion mmt --finetune-after 1 --max-epochs 6"
    # Some tests compare the text of the code, so any change makes them fail.
    test = "-m pytest -q -x --ignore=tests/course --ignore=tests/studies"
    for command, words in [(train, "on the test session"), (test, "1 failed")]:
        command = [sys.executable, *command.split()]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        assert words in done.stdout, done.stderr
