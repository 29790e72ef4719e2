"""A student's copy, its checks, and the teacher's key.

    python -m tests.course.classroom student DIR                      nine empty bodies
    python -m tests.course.classroom check [DIR ...] [--csv FILE]     verdicts, points
    python -m tests.course.classroom check --exercise 5               one exercise
    python -m tests.course.classroom key FILE                         for teachers

`check` runs the checks of this project on the code in DIR, so a check that was changed
in DIR has no effect. Without DIR, it checks this project. Each exercise has a process
and a time limit of its own. At the end, this process is killed with its children. So an
endless loop, an exit or a crash costs one exercise. Careful: this is not a sandbox. The
code in DIR may do all that you may do, for example delete your files.
"""

import argparse
import ast
import codecs
import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COURSE = Path("tests/course")
CHECKS = ROOT / COURSE / "checks.py"
FILES = ("model.py", "data.py", "train.py", "evaluate.py")
PAGES = ("README.md", "tests/corpora/README.md", "tests/course/README.md")
# A student gets these as they are, and the scripts of the course.
SHARED = ("requirements.txt", ".gitignore", "tests/__init__.py", "tests/conftest.py")
# Sections of the course's page that have answers, or need files that a student lacks.
FOR_TEACHERS = ("## Silent bugs", "## For teachers", "### The star")
# By number: the file, the function, and its minutes. Five minutes are a point.
EXERCISES = {
    1: ("model.py", "masked_mean", 15),
    2: ("model.py", "cross_modal_attention", 30),
    3: ("model.py", "SqueezeExcitation.forward", 15),
    4: ("model.py", "TextFeatureExtractor.forward", 25),
    5: ("model.py", "TransformerBlock.forward", 35),
    6: ("evaluate.py", "unweighted_accuracy", 10),
    7: ("data.py", "split", 30),
    8: ("train.py", "Patience.step", 30),
    9: ("data.py", "gather", 40),
}
# Exercises that call another one.
NEEDS = {3: 1, 5: 2}
# The comments that stay: from a tag to the end of the comment.
TAGGED = re.compile(
    r"(?m)^ *# (?:UNSPECIFIED|DEVIATION|PAPER-ERROR|Eq\. ).*\n(?: *#.*\n)*"
)


def read(name: str | Path) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def body_of(number: int) -> tuple[str, str]:
    """Find the body of an exercise, and whose docstring describes it.

    The second is "function", or "class" if the method has no docstring.
    """
    file, name, _ = EXERCISES[number]
    lines = read(file).split("\n")
    node = ast.parse(read(file))
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", "") == part)
    owner = "class"
    first = node.body[0].lineno
    if ast.get_docstring(node):
        owner = "function"
        first = node.body[0].end_lineno + 1
    # The comments above the first statement belong to the body.
    while lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return "\n".join(lines[first - 1 : node.end_lineno]), owner


# --- The student's copy ---------------------------------------------------------------


def emptied(file: str) -> str:
    """Empty the exercises of a file, except for comments with a tag."""
    code = read(file)
    for number, (its_file, name, _) in EXERCISES.items():
        if its_file == file:
            body, owner = body_of(number)
            indent = re.match(r" *", body)[0]
            message = f"exercise {number}, {name}, is yours to write first: "
            message += f"the docstring of the {owner} describes it"
            empty = f'{indent}raise SystemExit("{message}")'
            code = code.replace(body, "".join(TAGGED.findall(body)) + empty)
            task = f"write the body that the docstring of the {owner} asks for"
            code = re.sub(rf"(# EXERCISE {number} .*?: ).*", rf"\1{task}", code)
    # The other readings are in a folder that the copy lacks.
    return re.sub(r"\s+(# )?\(tests/studies\)", "", code)


def missing(text: str, folder: Path) -> list[str]:
    """List the files, folders and modules in a text that a copy does not have."""
    paths = [f"/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*")]
    lacking = []
    for name in re.findall(r"\b[\w/]+\.(?:py|md)\b|\btests(?:[./]\w+)+", text):
        path = "/" + re.sub(r"\.(?!(py|md)$)", "/", name)  # of a module, too
        if not any(known.endswith((path, f"{path}.py")) for known in paths):
            lacking.append(name)
    return lacking


def page_for_students(page: str, folder: Path) -> str:
    """Leave out what needs a file that a copy does not have.

    That is: the sections for teachers, what a cell of a table says after "and in the
    repository", and each sentence, and line of a table or of code, that names a file.
    """
    sections = re.split(r"(?m)^(?=##)", page)
    page = "".join(part for part in sections if not part.startswith(FOR_TEACHERS))
    page = re.sub(r",? and in the repository [^|]*(?= \|)", "", page)
    kept = []
    for block in page.split("\n\n"):
        if missing(block, folder):
            has_lines = "---|" in block or block.startswith("```")
            end = r"\n" if has_lines else r"(?<=[.?!])\s+(?=[A-Z`\[(])"
            parts = []
            for part in re.split(end, block):
                if "needs the repository" not in part and not missing(part, folder):
                    parts.append(part)
            block = "\n".join(parts)
        if block.strip("`\n"):
            kept.append(block.strip("\n"))
    return "\n\n".join(kept) + "\n"


def student(folder: Path) -> None:
    """Write the student's copy into an empty folder."""
    from tests.course import first_hour  # imports torch, which `check` does not need

    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty")
    names = [*SHARED]
    for path in (ROOT / COURSE).glob("*.py"):
        if not path.name.startswith(("hunts", "test_")):
            names.append(COURSE / path.name)
    for name in [*names, *PAGES]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in FILES:
        (folder / name).write_text(emptied(name), encoding="utf-8")
    for name in PAGES:
        page = page_for_students(read(name), folder)
        (folder / name).write_text(page, encoding="utf-8")
    # The first hour needs five exercises, so the copy has its output.
    with contextlib.redirect_stdout(io.StringIO()) as output:
        first_hour.main()
    path = folder / COURSE / "first_hour.txt"
    path.write_text(output.getvalue(), encoding="utf-8")
    print(f"{folder}: nine exercises. python -m tests.course.classroom check")


# --- The check ------------------------------------------------------------------------


def make_task(folder: Path, number: int, checks: Path) -> dict:
    """Say for judge.py what it has to check."""
    file, name, _ = EXERCISES[number]
    task = {"number": number, "checks": str(checks), "name": name, "right": None}
    task["module"] = file.removesuffix(".py")
    if number in NEEDS and folder.resolve() != ROOT:
        file, name, _ = EXERCISES[NEEDS[number]]
        task["right"] = [str(ROOT / file), name]
    return task


def run_judge(folder: Path, number: int, checks: Path, seconds: float) -> str:
    """Run judge.py in a copy, and kill all that it has started. Returns one line."""
    # Python starts in the copy, so it imports the four files of the copy. The checks
    # and judge.py are those of the project.
    judge = str(ROOT / COURSE / "judge.py")
    code = f"import runpy; runpy.run_path({judge!r}, run_name='__main__')"
    task = make_task(folder, number, checks)
    with tempfile.TemporaryDirectory() as private:
        file = Path(private) / "verdict.txt"
        task["file"] = str(file)
        process = subprocess.Popen(
            [sys.executable, "-B", "-X", "utf8", "-c", code],
            cwd=str(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(task).encode(), seconds)
            sentence = file.read_text(encoding="utf-8", errors="replace")
        except subprocess.TimeoutExpired:
            sentence = "it does not end: is there a loop without an end?"
        except OSError:
            sentence = "Python ends before the check does: is there an exit?"
        finally:
            process.kill()
            if hasattr(os, "killpg"):  # not on Windows
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # The character "|" separates the cells of a table.
    sentence = " ".join(sentence.replace("|", "/").split())
    return re.sub(r"[\x00-\x1f]", "?", sentence)[:500]


def verdicts(
    folder: Path, numbers: list[int], checks: Path = CHECKS, seconds: float = 60
) -> dict[int, str]:
    """Check exercises of a copy, up to four at a time."""

    def run(number: int) -> str:
        try:
            return run_judge(folder, number, checks, seconds)
        except OSError as problem:  # for example, there is no such folder
            return str(problem)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        sentences = dict(zip(numbers, pool.map(run, numbers), strict=True))
    for number, needed in NEEDS.items():
        pair = [sentences.get(number, "passed"), sentences.get(needed, "passed")]
        if folder.resolve() == ROOT and "passed" not in pair:
            sentences[number] = f"after exercise {needed}, which it calls"
    return sentences


def check(
    folders: list[Path], table: Path | None = None, only: int | None = None
) -> bool:
    """Print a table for each copy. Returns whether everything passed.

    table   a CSV file to write: a row for each copy, with the points of each exercise
    only    the one exercise to check, together with the exercise that it calls
    """
    numbers = [n for n in EXERCISES if only is None or n in (only, NEEDS.get(only))]
    best = {number: EXERCISES[number][2] // 5 for number in numbers}
    rows = [["copy", *numbers, "points"]]
    for folder in folders:
        sentences = verdicts(folder, numbers)
        print(f"\n{folder}\n\n| exercise | | points | verdict |\n|---|---|---|---|")
        points = []
        for number, sentence in sentences.items():
            points.append(best[number] if sentence == "passed" else 0)
            name = EXERCISES[number][1]
            of = f"{points[-1]} of {best[number]}"
            print(f"| {number} | {name} | {of} | {sentence} |")
        n_passed = list(sentences.values()).count("passed")
        total = sum(points)
        passed = f"{n_passed} of {len(numbers)} passed"
        print(f"\n{passed}, {total} of {sum(best.values())} points")
        rows.append([folder, *points, total])
        if table:  # after each copy, so that an interruption loses nothing
            lines = io.StringIO(newline="")
            csv.writer(lines).writerows(rows)
            table.write_bytes(lines.getvalue().encode(errors="replace"))
    return all(row[-1] == sum(best.values()) for row in rows[1:])


# --- The teacher's key ----------------------------------------------------------------


def key(path: Path) -> None:
    """Write the teacher's key: the answers, the bodies of the code, and the hunts."""
    # Every letter is replaced by the 13th after it, so nobody reads it by accident. To
    # change it: python -m encodings.rot_13 < tests/course/answers.rot13 > answers.md
    if not (ROOT / COURSE / "answers.rot13").exists():
        sys.exit("this is a student's copy. The key is made from the repository")
    from tests.course.hunts import BUGS  # a student's copy does not have it

    answers = codecs.decode(read(COURSE / "answers.rot13"), "rot13")
    lines = [answers, "## The nine exercises\n"]
    for number, (file, name, _) in EXERCISES.items():
        body, _ = body_of(number)
        lines.append(f"**{number}. `{name}`** ({file})\n\n```python\n{body}\n```\n")
    lines.append("## The hunts\n\n| N | what a user reports | what is wrong | where |")
    lines.append("|---|---|---|---|")
    for number, (fault, (report, changes)) in enumerate(BUGS.items(), 1):
        file, _, new = changes[0]
        lines.append(f"| {number} | {report} | {fault} | {file}: `{new.strip()}` |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: not for students")


def main() -> None:
    parser = argparse.ArgumentParser(description="Copies, checks, and the key.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("student", help="write a copy with empty bodies")
    command.add_argument("path", type=Path, metavar="DIR")
    command = commands.add_parser("check", help="print verdicts and points")
    command.add_argument("folders", type=Path, nargs="*", metavar="DIR", default=[ROOT])
    command.add_argument("--csv", type=Path, metavar="FILE", help="the points, too")
    command.add_argument("--exercise", type=int, choices=EXERCISES, help="only this")
    command = commands.add_parser("key", help="write all answers, for teachers")
    command.add_argument("path", type=Path, metavar="FILE")
    args = parser.parse_args()
    # A folder may have a name that the terminal cannot show.
    sys.stdout.reconfigure(errors="replace")
    if args.command == "student":
        student(args.path)
    elif args.command == "check":
        sys.exit(not check(args.folders, args.csv, args.exercise))
    else:
        key(args.path)


if __name__ == "__main__":
    main()
