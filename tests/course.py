"""A student's copy, its checks, and the teacher's key.

    python tests/course.py student DIR      the project with nine empty bodies and without answers
    python tests/course.py check [DIR ...]  a table of nine rows for each copy; without DIR, for this one
    python tests/course.py key FILE         the answers to every question, exercise and hunt (Markdown)

`check` runs the checks of this repository on the code in DIR, so a changed check in DIR has no
effect. Exercises 3 and 5 call what exercises 1 and 2 ask for.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("model.py", "data.py", "train.py", "evaluate.py")
# What a student gets beside the four files. No answers: neither ours nor those of the tests.
SHARED = ("README.md", "requirements.txt", ".gitignore", "tests/course.py", "tests/test_checks.py",
          "tests/conftest.py", "tests/trace.py", "tests/first_hour.py", "tests/figures.py",
          "tests/CORPORA.md", "tests/pictures")  # fmt: skip
NEEDS = {3: 1, 5: 2}
# Sections of COURSE.md that answer its own questions, or that need files which a student does not get
OURS = ("## Silent bugs", "## For teachers", "### The star")
TAG = re.compile(r"\s*# (UNSPECIFIED|DEVIATION|PAPER-ERROR|Eq\. )")


def exercises(source):
    """Find the exercises of a file: {number: (name, first and last line of the body)}."""
    found, lines, tree = {}, source.split("\n"), ast.parse(source)
    classes = [("", tree), *((f"{x.name}.", x) for x in tree.body if isinstance(x, ast.ClassDef))]
    for owner, node in [(owner, node) for owner, parent in classes for node in parent.body]:
        if isinstance(node, ast.FunctionDef):
            mark = re.match(r"\s*# EXERCISE (\d)", lines[node.lineno - 2])
            if mark:
                documented = isinstance(node.body[0], ast.Expr)
                first = node.body[0].end_lineno + 1 if documented else node.body[0].lineno
                while lines[first - 2].lstrip().startswith("#"):  # comments above the first statement
                    first -= 1
                found[int(mark[1])] = owner + node.name, first, node.end_lineno
    return found


def emptied(source):
    """Return the file with empty exercises. Comments with a tag stay: they say what was decided."""
    lines = source.split("\n")
    for number, (name, first, last) in sorted(exercises(source).items(), key=lambda x: -x[1][1]):
        body, kept, keeping = lines[first - 1 : last], [], False
        for line in body:
            comment = line.lstrip().startswith("#")
            keeping = comment and (keeping or bool(TAG.match(line)))
            kept += [line] if keeping else []
        indent = re.match(r" *", body[0])[0]
        kept.append(f'{indent}raise SystemExit("exercise {number}, {name}, is yours to write first")')
        lines[first - 1 : last] = kept
    task = "write the body; python tests/course.py check"
    return re.sub(r"delete the body, write it again; pytest -m ex\d", task, "\n".join(lines))


def without(page, titles):
    """Return a Markdown page without the sections of these titles, each up to the next heading."""
    parts = re.split(r"(?m)^(?=##)", page)
    return "".join(part for part in parts if not part.startswith(titles))


def student(folder):
    """Write the student's copy into an empty folder."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty")
    for name in SHARED:
        source, target = ROOT / name, folder / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    for name in FILES:
        text = emptied((ROOT / name).read_text(encoding="utf-8"))
        (folder / name).write_text(text, encoding="utf-8")
    page = without((ROOT / "tests" / "COURSE.md").read_text(encoding="utf-8"), OURS)
    (folder / "tests" / "COURSE.md").write_text(page, encoding="utf-8")
    # The first hour needs five exercises, so its output comes with the copy.
    hour = [sys.executable, "-X", "utf8", ROOT / "tests" / "first_hour.py"]
    done = subprocess.run(hour, capture_output=True, check=True)
    (folder / "tests" / "first_hour.txt").write_bytes(done.stdout)
    print(f"{folder}: nine exercises to write. python tests/course.py check")


ALL = """
import json, sys
sys.path[:0] = [{code!r}, {checks!r}]
import test_checks
for n in range(1, 10):
    print(json.dumps(test_checks.verdict(n)), flush=True)
"""


def verdicts(folder, seconds=60):
    """Run the nine checks on a copy: a sentence each."""
    code = ALL.format(code=str(folder.resolve()), checks=str(ROOT / "tests"))
    command, found = [sys.executable, "-c", code], []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=folder)
        found, rest = done.stdout.splitlines(), (done.stderr.strip() or "nothing").split("\n")[-1]
    except subprocess.TimeoutExpired as late:
        found = (late.stdout or b"").decode().splitlines()
        found.append(json.dumps("it does not end: is there a loop without an end?"))
        rest = "not reached"
    found = [" ".join(json.loads(line).split()).replace("|", "/") for line in found]
    found += [rest] * (9 - len(found))
    for n, needed in NEEDS.items():
        if found[n - 1] != "passed" and found[needed - 1] != "passed":
            found[n - 1] = f"after exercise {needed}, which it calls"
    return found


def check(folders):
    """Print a table for each copy. Returns whether everything passed."""
    everything = True
    for folder in folders:
        names = {n: found[0] for name in FILES
                 for n, found in exercises_of(folder / name).items()}  # fmt: skip
        found = verdicts(folder)
        print(f"\n{folder}\n\n| exercise | | verdict |\n|---|---|---|")
        for n, verdict in enumerate(found, 1):
            print(f"| {n} | {names.get(n, '?')} | {verdict} |")
        print(f"\n{found.count('passed')} of 9 passed")
        everything &= found.count("passed") == 9
    return everything


def exercises_of(path):
    """Find the exercises of a student's file, which may not compile."""
    try:
        return exercises(path.read_text(encoding="utf-8"))
    except (SyntaxError, OSError, ValueError):
        return {}


def key(path):
    """Write the teacher's key: the answers, the bodies from the code, the hunts."""
    if not (ROOT / "tests" / "ANSWERS.md").exists():
        sys.exit("this is a student's copy: the key is made from the repository")
    parts = [(ROOT / "tests" / "ANSWERS.md").read_text(encoding="utf-8"), "\n## The nine exercises\n"]
    for name in FILES:
        source = (ROOT / name).read_text(encoding="utf-8")
        for n, (function, first, last) in sorted(exercises(source).items()):
            body = "\n".join(source.split("\n")[first - 1 : last])
            parts.append(f"**{n}. `{function}`** ({name})\n\n```python\n{body}\n```\n")
    parts.append("## The hunts\n\n| N | what a user reports | what is wrong | where |\n|---|---|---|---|")
    import bugs

    for n, (what, (report, changes)) in enumerate(bugs.BUGS.items(), 1):
        parts.append(f"| {n} | {report} | {what} | {changes[0][0]}: `{changes[0][2].strip()}` |")
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print(f"{path}: not for students")


def main(arguments):
    if arguments[:1] == ["student"] and len(arguments) == 2:
        student(Path(arguments[1]))
    elif arguments[:1] == ["check"]:
        sys.exit(not check([Path(x) for x in arguments[1:]] or [ROOT]))
    elif arguments[:1] == ["key"] and len(arguments) == 2:
        key(Path(arguments[1]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
