"""A student's copy, its checks, and the teacher's key.

    python -m tests.course.classroom student DIR                      nine empty bodies
    python -m tests.course.classroom check [DIR ...] [--csv FILE]     verdicts, points
    python -m tests.course.classroom check --exercise 5               one exercise
    python -m tests.course.classroom key FILE                         for teachers

`check` runs the checks of this project on the code in DIR, or on this project itself.
Each exercise has a process and a time limit of its own, so an endless loop or a crash
costs one exercise. Careful: this is not a sandbox. The code in DIR may delete your
files.
"""

import argparse
import ast
import codecs
import csv
import io
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from tests.course.checks import EXERCISES

ROOT = Path(__file__).resolve().parents[2]
COURSE = Path("tests/course")
FILES = ("model.py", "data.py", "train.py", "evaluate.py")
PAGES = ("README.md", "tests/corpora/README.md", "tests/course/README.md")
# A student gets these as they are, and the scripts of the course.
SHARED = ("requirements.txt", ".gitignore", "tests/__init__.py")
# Sections of the course's page that have answers, or need files that a student lacks.
FOR_TEACHERS = ("## Silent bugs", "## For teachers", "### The star")
NOTE = "> This is a student's copy, without hunts, studies and tests.\n\n"
# The comments that stay: from a tag to the end of the comment.
TAGGED = r"(?m)^ *# (?:UNSPECIFIED|DEVIATION|PAPER-ERROR|Eq\. ).*\n(?: *#.*\n)*"


def read(name: str | Path) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def body_of(number: int) -> str:
    """Find the body of an exercise: what is below its docstring or its signature."""
    file, name, *_ = EXERCISES[number]
    node = ast.parse(read(file))
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", "") == part)
    above = node.body[0] if ast.get_docstring(node) else node.returns
    return "\n".join(read(file).split("\n")[above.end_lineno : node.end_lineno])


# --- The student's copy ---------------------------------------------------------------


def emptied(file: str) -> str:
    """Empty the exercises of a file, except for comments with a tag."""
    code = read(file)
    for number, (its_file, name, *_) in EXERCISES.items():
        if its_file == file:
            body = body_of(number)
            indent = re.match(r" *", body)[0]
            message = f"exercise {number}, {name}, is yours to write first"
            empty = f'{indent}raise SystemExit("{message}")'
            code = code.replace(body, "".join(re.findall(TAGGED, body)) + empty)
    return re.sub(r"(# EXERCISE .*?: ).*", r"\1write the body", code)


def student(folder: Path) -> None:
    """Write the student's copy into an empty folder."""
    # This imports the four files. `check` must not, because they may be broken.
    from tests.course import first_hour

    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty")
    texts = {name: read(name) for name in SHARED}
    for path in (ROOT / COURSE).glob("*.py"):
        if not path.name.startswith(("hunts", "test_")):
            texts[COURSE / path.name] = read(path)
    for name in FILES:
        texts[name] = emptied(name)
    for name in PAGES:
        sections = re.split(r"(?m)^(?=##)", read(name))
        kept = [part for part in sections if not part.startswith(FOR_TEACHERS)]
        texts[name] = NOTE + "".join(kept)
    # The first hour needs five exercises, so the copy has its output.
    with redirect_stdout(io.StringIO()) as output:
        first_hour.main()
    texts[COURSE / "first_hour.txt"] = output.getvalue()
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{folder}: nine exercises. python -m tests.course.classroom check")


# --- The check ------------------------------------------------------------------------


def verdict(folder: Path, number: int, seconds: float = 60) -> str:
    """Run judge.py on an exercise of a copy. Returns its verdict in one line."""
    with tempfile.TemporaryDirectory() as private:
        file = Path(private) / "verdict.txt"
        command = [sys.executable, "-B", ROOT / COURSE / "judge.py", str(number), file]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        try:
            subprocess.run(command, cwd=folder, timeout=seconds, **streams)
            sentence = file.read_text(encoding="utf-8")
        except subprocess.TimeoutExpired:
            sentence = "it does not end: is there a loop without an end?"
        except OSError:
            sentence = "Python ends before the check does: is there an exit?"
    # The character "|" separates the cells of a table.
    return " ".join(sentence.replace("|", "/").split())[:500]


def check(folders: list[Path], numbers: list[int], table: Path | None = None) -> bool:
    """Check these exercises of each copy. Returns whether everything passed.

    table   a CSV file to write, with the points: one row per copy
    """
    best = {n: minutes // 5 for n, (_, _, minutes, _) in EXERCISES.items()}
    rows = [["copy", *numbers, "points"]]
    all_points = []
    for folder in folders:
        if not folder.is_dir():
            sys.exit(f"there is no folder {folder}")
        with ThreadPoolExecutor(4) as pool:
            sentences = list(pool.map(partial(verdict, folder), numbers))
        print(f"\n{folder}\n\n| exercise | | points | verdict |\n|---|---|---|---|")
        points = []
        for n, sentence in zip(numbers, sentences, strict=True):
            points.append(best[n] if sentence == "passed" else 0)
            name = EXERCISES[n][1]
            print(f"| {n} | {name} | {points[-1]} of {best[n]} | {sentence} |")
        all_points += points
        print(f"\n{sum(points)} of {sum(best[n] for n in numbers)} points")
        rows.append([folder, *points, sum(points)])
    if table:
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return all(all_points)


# --- The teacher's key ----------------------------------------------------------------


def key(path: Path) -> None:
    """Write the teacher's key: the answers, the bodies of the code, and the hunts."""
    from tests.course.hunts import BUGS  # a student's copy does not have it

    # Every letter is replaced by the 13th after it, so nobody reads it by accident. To
    # change it: python -m encodings.rot_13 < tests/course/answers.rot13 > answers.md
    answers = codecs.decode(read(COURSE / "answers.rot13"), "rot13")
    lines = [answers, "## The nine exercises\n"]
    for n, (file, name, *_) in EXERCISES.items():
        lines.append(f"**{n}. `{name}`** ({file})\n\n```python\n{body_of(n)}\n```\n")
    lines.append("## The hunts\n")
    for number, (fault, (report, changes)) in enumerate(BUGS.items(), 1):
        file, _, new = changes[0]
        lines.append(f"{number}. *{report}* It is: {fault}. {file}: `{new.strip()}`")
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
    if args.command == "student":
        student(args.path)
    elif args.command == "check":
        numbers = [args.exercise] if args.exercise else list(EXERCISES)
        sys.exit(not check(args.folders, numbers, args.csv))
    else:
        key(args.path)


if __name__ == "__main__":
    main()
