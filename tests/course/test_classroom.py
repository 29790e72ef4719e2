"""A student's copy without answers, its verdicts, the teacher's key, and the hunts."""

import ast
import csv
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.course import classroom, hunts


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "copy"
    classroom.student(folder)
    return folder


NAMES = {number: name for number, (_, name, _) in classroom.EXERCISES.items()}


def read(path):
    return path.read_text(encoding="utf-8")


# --- The student's copy ---------------------------------------------------------------


def test_a_copy_has_no_answer(copy):
    paths = [path for path in copy.rglob("*") if path.suffix in (".py", ".md", ".txt")]
    everything = "\n".join(read(path) for path in paths)
    for number in NAMES:
        body, _ = classroom.body_of(number)
        lines = [line.partition("#")[0].strip() for line in body.split("\n")]
        assert max(lines, key=len) not in everything
    names = {path.name for path in copy.rglob("*")}
    assert not names & {"answers.rot13", "bugs.rot13", "mistakes.md", "hunts.py"}
    assert not [name for name in names if name.startswith("test_")]
    assert "row sums" in read(copy / "tests/course/first_hour.txt")
    with pytest.raises(SystemExit, match="not empty"):
        classroom.student(copy)


def docstrings(source):
    """List the names of the classes and functions, with their docstrings."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [(node.name, ast.get_docstring(node)) for node in nodes]


def test_a_copy_has_nine_empty_bodies_with_docstrings_and_tags(copy):
    for number, (file, path, minutes) in classroom.EXERCISES.items():
        code = read(copy / file)
        _, owner = classroom.body_of(number)
        class_name, _, name = path.rpartition(".")
        described = name if owner == "function" else class_name
        assert dict(docstrings(code))[described], "every exercise has a docstring"
        task = f"write the body that the docstring of the {owner} asks for"
        assert f"# EXERCISE {number} ({minutes} min): {task}\n" in code
        message = f"exercise {number}, {path}, is yours to write first: the docstring"
        assert code.count(f'raise SystemExit("{message} of the {owner} des') == 1
    for name in classroom.FILES:
        code = read(copy / name)
        whole = read(ROOT / name)
        assert docstrings(code) == docstrings(whole)
        tags = re.compile(r"\[[ADE]\d+\]")
        assert set(tags.findall(code)) == set(tags.findall(whole))


def test_a_copy_names_no_file_that_it_lacks(copy):
    for path in copy.rglob("*.md"):
        assert classroom.missing(read(path), copy) == [], path
    for path in copy.rglob("*.py"):
        text = ast.get_docstring(ast.parse(read(path))) or ""
        for _, docstring in docstrings(read(path)):
            text += docstring or ""
        assert classroom.missing(text, copy) == [], path
    for name in classroom.FILES:
        assert "tests/studies" not in read(copy / name)
    assert "## Exercises" in read(copy / "tests/course/README.md")
    assert "## For teachers" not in read(copy / "tests/course/README.md")
    text = "model.py, tests.course.trace, tests/course; tests/studies, tests.x and y.py"
    assert classroom.missing(text, copy) == ["tests/studies", "tests.x", "y.py"]
    page = "Read\n`model.py`. Run x.py. Then stop.\n\n| a |\n|---|\n| x.py |\n| b |"
    page += "\n\n```\npython x.py\n```\n"
    kept = "Read\n`model.py`.\nThen stop.\n\n| a |\n|---|\n| b |\n"
    assert classroom.page_for_students(page, copy) == kept


# --- Verdicts -------------------------------------------------------------------------

# Bodies of exercise 1, with what its verdict begins with. They run in small copies
# without torch, beside an exercise 2 that is right.
HOSTILE = {
    "return 42": "passed",
    "return 41": "is it 42?",
    "print('passed\\n' * 9); return 41": "is it 42?",
    "raise AssertionError('passed')": "it stops with AssertionError in line 2 of model",
    "raise KeyboardInterrupt": "it stops with KeyboardInterrupt in line 2 of model.py",
    "sys.exit(0)": "it stops with SystemExit in line 2 of model.py: 0. What",
    "sys.exit('passed')": "it stops with SystemExit in line 2",
    "raise SystemExit('exercise 1, f, is yours to write first')": "exercise 1, f, is",
    "os._exit(0)": "Python ends before",
    "os.kill(os.getpid(), 9)": "Python ends before",
    "return input()": "it stops with EOFError in line 2 of model.py",
    "os.close(0); os.close(1); os.close(2); return 42": "passed",
    "sys.stdout = sys.stderr = None; print('x'); return 42": "passed",
    "os.chdir('/'); return 42": "passed",
    "return masked_mean()": "it stops with RecursionError",
    "raise ValueError('|\\n\\0\\ud800' + 1000 * 'x')": "it stops with ValueError",
    "raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})": "Python ends",
    "threading.Thread(target=time.sleep, args=[60]).start(); return 42": "passed",
    "atexit.register(time.sleep, 60); return 42": "passed",
    "while True: pass": "it does not end",
    "time.sleep(60)": "it does not end",
}
MODULES = {
    "def (": "it stops with SyntaxError: ",
    "import no_such_module": "it stops with ModuleNotFoundError in line 1 of model.py",
    "print('passed\\n' * 9)": "it stops with AttributeError",
    "import sys; sys.exit(0)": "it stops with SystemExit in line 1 of model.py",
    "import os; os._exit(0)": "Python ends before",
}
CHECKS = """
def check(answer):
    assert answer() == 42, "is it 42?"

CHECKS = 5 * [check]
"""
EXERCISE_2 = "def cross_modal_attention(): return 42"
AFTER_1 = "after exercise 1, which it calls"


@pytest.fixture
def small(tmp_path):
    """A function that checks a small copy with this code in its model.py."""
    checks = tmp_path / "checks.py"
    checks.write_text(CHECKS)
    folder = tmp_path / "copy"
    folder.mkdir()

    def verdicts(code, numbers=(1, 2), seconds=60):
        (folder / "model.py").write_text(code)
        return classroom.verdicts(folder, numbers, checks, seconds)

    return verdicts


@pytest.mark.parametrize("body", HOSTILE)
def test_an_answer_has_the_verdict_that_it_deserves(body, small):
    modules = "import atexit, os, sys, threading, time"
    code = f"def masked_mean():\n    {body}\n{modules}\n{EXERCISE_2}"
    seconds = 1 if "not end" in HOSTILE[body] else 60
    (sentence,) = small(code, [1], seconds).values()
    assert sentence.startswith(HOSTILE[body])
    assert len(sentence) <= 500
    assert not re.search(r"[|\n\0\ud800]", sentence)
    if seconds == 1:  # the other exercises do not pay for it
        assert small(code, [2]) == {2: "passed"}


@pytest.mark.parametrize("code", MODULES)
def test_a_copy_that_does_not_load_has_a_verdict_for_each_exercise(code, small):
    first, second = small(code).values()
    assert first == second.replace("cross_modal_attention", "masked_mean")
    assert first.startswith(MODULES[code])


def test_an_error_in_given_code_has_the_line_of_the_answer_that_calls_it(small):
    code = "def given():\n    return 1 / 0\n\ndef masked_mean():\n    return given()\n"
    (sentence,) = small(code, [1]).values()
    assert sentence.startswith("it stops with ZeroDivisionError in line 5 of model.py")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a test for Linux and macOS")
def test_a_process_that_an_answer_starts_is_ended_with_it(small, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    code = """
import os, time
def masked_mean():
    writer = os.open("../fifo", os.O_WRONLY)
    if os.fork() == 0:
        time.sleep(9)
        os.write(writer, b"still alive")
        os._exit(0)
    return 42
"""
    assert small(code, [1]) == {1: "passed"}
    os.set_blocking(reader, True)
    assert os.read(reader, 99) == b""  # the end: nobody has it open for writing
    os.close(reader)


def test_what_an_answer_calls_is_that_of_the_project(small, tmp_path, monkeypatch):
    project = tmp_path / "project"
    shutil.copytree(ROOT / "tests/course", project / "tests/course")
    (project / "model.py").write_text(EXERCISE_2)
    monkeypatch.setattr(classroom, "ROOT", project)
    code = """
def cross_modal_attention(): return 0
class TransformerBlock:
    def forward(): return cross_modal_attention()
"""
    assert small(code, [2, 5]) == {2: "is it 42?", 5: "passed"}


@pytest.mark.slow
def test_the_checks_are_those_of_this_project_and_leave_nothing_behind(copy):
    assert classroom.check([ROOT])
    (copy / "tests/course/checks.py").write_text("raise ValueError")
    for sentence in classroom.verdicts(copy, list(NAMES)).values():
        assert "is yours to write first" in sentence
    assert not list(copy.rglob("__pycache__"))


def test_the_table_has_the_points_of_every_copy(monkeypatch, tmp_path, capsys):
    def run_judge(folder, number, checks, seconds):
        return "passed" if folder.name == "good" or number in (2, 6) else "why?"

    monkeypatch.setattr(classroom, "run_judge", run_judge)
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert classroom.check([good])
    rows = re.findall(r"(?m)^\| \d \| ([\w.]+) \|.*passed", capsys.readouterr().out)
    assert rows == list(NAMES.values())
    assert not classroom.check([bad, good], tmp_path / "points.csv")
    out = capsys.readouterr().out
    assert "| 1 | masked_mean | 0 of 3 | why? |" in out
    assert "2 of 9 passed, 8 of 46 points" in out
    with (tmp_path / "points.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["copy", *"123456789", "points"]
    assert rows[0] == [str(bad), *"060002000", "8"]
    assert rows[1] == [str(good), *"363572668", "46"]
    # One exercise comes with the exercise that it calls.
    assert not classroom.check([bad], only=5)
    out = capsys.readouterr().out
    assert re.findall(r"(?m)^\| (\d)", out) == ["2", "5"]
    assert "1 of 2 passed, 6 of 13 points" in out
    monkeypatch.setattr(sys, "argv", ["x", "check", str(good), "--exercise", "4"])
    with pytest.raises(SystemExit, match="False"):
        classroom.main()
    assert "1 of 1 passed, 5 of 5 points" in capsys.readouterr().out
    # In the project itself, two exercises call others that may be empty.
    monkeypatch.setattr(classroom, "ROOT", bad)
    sentences = classroom.verdicts(bad, [1, 2, 3, 5])
    assert sentences == {1: "why?", 2: "passed", 3: AFTER_1, 5: "why?"}


def test_a_folder_that_does_not_exist_has_a_verdict(tmp_path):
    assert "No such file" in classroom.verdicts(tmp_path / "x", [1])[1]


# --- The key --------------------------------------------------------------------------


def test_the_key_has_all_answers_and_a_copy_cannot_make_it(copy, tmp_path, monkeypatch):
    classroom.key(tmp_path / "key.md")
    key = read(tmp_path / "key.md")
    found = re.findall(r"(?m)^\*\*\d\. `([\w.]+)`", key)
    assert found == list(NAMES.values())
    assert "clamp(min=1)" in key
    # Every sitting has a question, and every question has an answer.
    questions = re.findall(r"(?m)^(\d)\. ", read(ROOT / "tests/course/README.md"))
    assert set("012345") <= set(questions)
    for number in "012345":
        assert f"**{number}a. " in key
    # No line of it is open in the course.
    pages = [*ROOT.glob("tests/course/*.md"), *ROOT.glob("tests/course/*.py")]
    course = "\n".join(read(path) for path in pages)
    answers = key.partition("## The nine")[0].split("\n")
    assert not [line for line in answers if len(line) > 60 and line in course]
    monkeypatch.setattr(classroom, "ROOT", copy)
    with pytest.raises(SystemExit, match="made from the repository"):
        classroom.key(tmp_path / "key.md")


# --- The hunts ------------------------------------------------------------------------

# Somebody may be hunting now. Then these tests must not name any bug.
hunting = pytest.mark.skipif(bool(hunts.hidden()), reason="a bug is hidden")
NUMBERS = range(len(hunts.BUGS))


@pytest.fixture
def project(tmp_path):
    for name in classroom.FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def code_of(folder):
    return {name: read(folder / name) for name in classroom.FILES}


@hunting
@pytest.mark.parametrize("number", NUMBERS)
def test_a_bug_can_be_put_in_and_taken_out(number, project):
    before = code_of(project)
    fault = list(hunts.BUGS)[number]
    _, changes = hunts.BUGS[fault]
    hunts.swap(changes, project)
    assert hunts.hidden(project) == [fault]
    for name, code in code_of(project).items():
        compile(code, name, "exec")
    hunts.swap(changes, project, back=True)
    assert hunts.hidden(project) == []
    assert code_of(project) == before


@hunting
def test_hide_and_reveal_delete_what_other_code_has_made(project, capsys):
    before = code_of(project)
    for command in (lambda: hunts.hide(None, project), lambda: hunts.reveal(project)):
        for name in ("cache/tiny", "runs/toy/mmt", "runs/iemocap/mmt", "corpora/toy"):
            (project / name).mkdir(parents=True, exist_ok=True)
        command()
        assert not (project / "cache").exists()
        assert [path.name for path in (project / "runs").iterdir()] == ["iemocap"]
        assert (project / "corpora" / "toy").exists()
    assert code_of(project) == before
    assert re.match("A user reports: .+\n.+\nIt was: ", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="None of these bugs"):
        hunts.reveal(project)


@hunting
def test_no_file_report_or_name_of_a_test_gives_a_bug_away(request):
    everything = "\n".join(item.nodeid for item in request.session.items)
    for path in (ROOT / "tests/course").iterdir():
        if path.suffix in (".py", ".md", ".rot13"):
            everything += read(path)
    files = []
    for fault, (report, changes) in hunts.BUGS.items():
        assert fault not in report
        assert fault not in everything
        assert report not in everything
        files.append(changes[0][0])
    assert len(files) == 12
    for name in classroom.FILES:
        assert files.count(name) >= 2


@hunting
@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_bug_trains_and_a_test_fails(number, project):
    fault = list(hunts.BUGS)[number]
    shutil.copy(ROOT / "README.md", project)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", project / "tests", ignore=ignored)
    hunts.swap(hunts.BUGS[fault][1], project)
    command = [sys.executable, "train.py", "--fusion", "mmt", "--device", "cpu"]
    command += ["--finetune-after", "1", "--max-epochs", "6"]
    process = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "on the test session" in process.stdout
    # Some tests compare the text of the code, so any change makes them fail.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--ignore", "tests/course/test_classroom.py"]
    command += ["--ignore", "tests/studies/test_alternatives.py"]
    process = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert process.returncode == 1, process.stdout[-2000:]
    assert "1 failed" in process.stdout
    for fault in hunts.BUGS:
        assert fault not in process.stdout
