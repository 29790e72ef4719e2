"""A student's copy, its checks, and the teacher's key.

    python -m tests.course.classroom student DIR       nine empty bodies, no answers
    python -m tests.course.classroom check [DIR ...]   a table of verdicts for each copy
    python -m tests.course.classroom key FILE          all answers, for teachers

`check` runs the checks of this project on the code in DIR, so a check that was changed
in DIR has no effect. Without DIR, it checks this project.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COURSE = Path("tests/course")
FILES = ("model.py", "data.py", "train.py", "evaluate.py")
# A student gets these as they are.
SHARED = (
    "README.md",
    "requirements.txt",
    ".gitignore",
    "tests/__init__.py",
    "tests/conftest.py",
    "tests/corpora/README.md",
    "tests/course/__init__.py",
    "tests/course/classroom.py",
    "tests/course/checks.py",
    "tests/course/trace.py",
    "tests/course/first_hour.py",
    "tests/course/figures.py",
    "tests/course/pictures.py",
)
# Sections of the course's page that have answers, or need files that a student lacks.
FOR_TEACHERS = ("## Silent bugs", "## For teachers", "### The star")
# Exercises that call another one.
NEEDS = {3: 1, 5: 2}
TAG = re.compile(r"\s*# (UNSPECIFIED|DEVIATION|PAPER-ERROR|Eq\. )")


def exercises(source: str) -> dict[int, tuple[str, int, int]]:
    """Find the exercises of a file: {number: (name, first line of the body, last)}."""
    lines = source.split("\n")
    tree = ast.parse(source)
    functions = [("", node) for node in tree.body]
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef):
            functions += [(f"{owner.name}.", node) for node in owner.body]
    exercises = {}
    for prefix, node in functions:
        if not isinstance(node, ast.FunctionDef):
            continue
        mark = re.match(r"\s*# EXERCISE (\d)", lines[node.lineno - 2])
        if mark:
            first = node.body[0].lineno
            if ast.get_docstring(node):
                first = node.body[0].end_lineno + 1
            # The comments above the first statement belong to the body.
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            exercises[int(mark[1])] = (prefix + node.name, first, node.end_lineno)
    return exercises


def emptied(source: str) -> str:
    """Empty the exercises of a file, except for comments with a tag."""
    lines = source.split("\n")
    # From the last to the first, so that the line numbers before stay right.
    for number, (name, first, last) in sorted(
        exercises(source).items(), key=lambda item: -item[1][1]
    ):
        body = lines[first - 1 : last]
        kept = []
        keeping = False
        for line in body:
            is_comment = line.lstrip().startswith("#")
            keeping = is_comment and (keeping or bool(TAG.match(line)))
            if keeping:
                kept.append(line)
        indent = re.match(r" *", body[0])[0]
        message = f"exercise {number}, {name}, is yours to write first"
        kept.append(f'{indent}raise SystemExit("{message}")')
        lines[first - 1 : last] = kept
    task = "write the body; python -m tests.course.classroom check"
    old_task = r"delete the body, write it again; pytest -m ex\d"
    return re.sub(old_task, task, "\n".join(lines))


def without_sections(page: str, titles: tuple[str, ...]) -> str:
    """Leave out sections of a Markdown page, each up to the next heading."""
    sections = re.split(r"(?m)^(?=##)", page)
    return "".join(section for section in sections if not section.startswith(titles))


def student(folder: Path) -> None:
    """Write the student's copy into an empty folder."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text("utf-8"))
    for name in [*SHARED, *pictures]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in FILES:
        code = emptied((ROOT / name).read_text(encoding="utf-8"))
        (folder / name).write_text(code, encoding="utf-8")
    page = (ROOT / COURSE / "README.md").read_text(encoding="utf-8")
    page = without_sections(page, FOR_TEACHERS)
    (folder / COURSE / "README.md").write_text(page, encoding="utf-8")
    # The first hour needs five exercises, so the copy has its output.
    command = [sys.executable, "-X", "utf8", "-m", "tests.course.first_hour"]
    first_hour = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (folder / COURSE / "first_hour.txt").write_bytes(first_hour.stdout)
    print(f"{folder}: nine exercises. python -m tests.course.classroom check")


def verdicts(folder: Path, seconds: float = 60) -> list[str]:
    """Run the nine checks on a copy: one sentence for each."""
    # Python starts in the copy, so the checks import the four files of the copy.
    path = str(ROOT / COURSE / "checks.py")
    code = f"import runpy; runpy.run_path({path!r}, run_name='__main__')"
    command = [sys.executable, "-c", code]
    try:
        process = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=seconds
        )
        lines = process.stdout.splitlines()
        rest = process.stderr.strip().split("\n")[-1] or "it stops without an error"
    except subprocess.TimeoutExpired as late:
        lines = (late.stdout or b"").decode().splitlines()
        lines.append(json.dumps("it does not end: is there a loop without an end?"))
        rest = "not reached"
    except OSError as problem:
        lines = []
        rest = str(problem)
    # In one line, and without the character that separates the cells of a table.
    sentences = [" ".join(json.loads(line).split()) for line in lines]
    sentences = [sentence.replace("|", "/") for sentence in sentences]
    sentences += [rest] * (9 - len(sentences))
    for number, needed in NEEDS.items():
        if "passed" not in (sentences[number - 1], sentences[needed - 1]):
            sentences[number - 1] = f"after exercise {needed}, which it calls"
    return sentences


def check(folders: list[Path]) -> bool:
    """Print a table for each copy. Returns whether everything passed."""
    names = {}
    for file in FILES:
        source = (ROOT / file).read_text(encoding="utf-8")
        for number, (name, _, _) in exercises(source).items():
            names[number] = name
    all_passed = True
    for folder in folders:
        sentences = verdicts(folder)
        print(f"\n{folder}\n\n| exercise | | verdict |\n|---|---|---|")
        for number, sentence in enumerate(sentences, 1):
            print(f"| {number} | {names.get(number, '?')} | {sentence} |")
        n_passed = sentences.count("passed")
        print(f"\n{n_passed} of 9 passed")
        all_passed = all_passed and n_passed == 9
    return all_passed


def key(path: Path) -> None:
    """Write the teacher's key: the answers, the bodies of the code, and the hunts."""
    answers = ROOT / COURSE / "ANSWERS.md"
    if not answers.exists():
        sys.exit("this is a student's copy. The key is made from the repository")
    from tests.course.hunts import BUGS  # a student's copy does not have it

    lines = [answers.read_text(encoding="utf-8"), "## The nine exercises\n"]
    for file in FILES:
        source = (ROOT / file).read_text(encoding="utf-8")
        for number, (name, first, last) in sorted(exercises(source).items()):
            body = "\n".join(source.split("\n")[first - 1 : last])
            lines.append(f"**{number}. `{name}`** ({file})\n\n```python\n{body}\n```\n")
    lines.append("## The hunts\n\n| N | what a user reports | what is wrong | where |")
    lines.append("|---|---|---|---|")
    for number, (fault, (report, changes)) in enumerate(BUGS.items(), 1):
        file, _, new = changes[0]
        lines.append(f"| {number} | {report} | {fault} | {file}: `{new.strip()}` |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: not for students")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["student"] and len(arguments) == 2:
        student(Path(arguments[1]))
    elif arguments[:1] == ["check"]:
        folders = [Path(name) for name in arguments[1:]]
        sys.exit(not check(folders or [ROOT]))
    elif arguments[:1] == ["key"] and len(arguments) == 2:
        key(Path(arguments[1]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
