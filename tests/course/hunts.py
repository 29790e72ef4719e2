"""Silent bugs to hunt: the code runs and trains with each of them, and is wrong.

    python -m tests.course.hunts hide [N]     put one in, and print what a user reports
    python -m tests.course.hunts reveal       name it, and take it out again
    python -m tests.course.hunts list         for teachers: all bugs with their changes

Between hide and reveal, find it: train, read, run the tests. The bugs are in a file
that nobody reads by accident. To change them, decode it, and encode it the same way:

    python -m encodings.rot_13 < tests/course/bugs.rot13 > bugs.json
"""

import argparse
import codecs
import json
import random
import shutil
import sys
from pathlib import Path

from tests.course.classroom import COURSE, FILES, ROOT, read

# The file has a list of [fault, a user's report, changes [file, old, new]].
LIST = json.loads(codecs.decode(read(COURSE / "bugs.rot13"), "rot13"))
BUGS = {fault: (report, changes) for fault, report, changes in LIST}


def swap(changes: list[list[str]], root: Path) -> None:
    """Replace the old texts of these changes by the new ones, all of them or none."""
    texts = {name: read(root / name) for name, _, _ in changes}
    for name, old, new in changes:
        if texts[name].count(old) != 1:
            sys.exit(f"{name} has changed. git checkout {name}, then try again")
        texts[name] = texts[name].replace(old, new)
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")
    # Delete the cache and the runs on the toy, which other code has made.
    for folder in (root / "cache", *root.glob("runs/toy*")):
        shutil.rmtree(folder, ignore_errors=True)


def hidden(root: Path = ROOT) -> list[str]:
    """List the bugs that are in the code now."""
    code = {name: read(root / name) for name in FILES}
    faults = []
    for fault, (_, changes) in BUGS.items():
        # A file of a bug has its new text, and no longer the old one.
        if all(new in code[f] and old not in code[f] for f, old, new in changes):
            faults.append(fault)
    return faults


def hide(number: int | None, root: Path = ROOT) -> None:
    """Put in one of the bugs, None for any of them, and print what a user reports."""
    if hidden(root):
        sys.exit("There is a bug in the code already. Find it, or reveal it")
    bugs = list(BUGS.values())
    report, changes = random.choice(bugs) if number is None else bugs[number - 1]
    swap(changes, root)
    print(f"A user reports: {report}\nFind the cause. (git diff would be cheating.)")


def reveal(root: Path = ROOT) -> None:
    """Name the bug that is in, and take it out again."""
    faults = hidden(root)
    if not faults:
        sys.exit("None of these bugs is in the code")
    for fault in faults:
        swap([[name, new, old] for name, old, new in BUGS[fault][1]], root)
        print(f"It was: {fault}. It is taken out again")


def main() -> None:
    parser = argparse.ArgumentParser(description="Hide a silent bug, and hunt it.")
    parser.add_argument("command", choices=["hide", "reveal", "list"])
    numbers = range(1, len(BUGS) + 1)
    parser.add_argument("number", nargs="?", type=int, choices=numbers)
    args = parser.parse_args()
    if args.command == "hide":
        hide(args.number)
    elif args.command == "reveal":
        reveal()
    else:
        print(json.dumps(LIST, indent=1))


if __name__ == "__main__":
    main()
