"""Check one exercise, in a process of its own. classroom.py starts it in each copy.

Standard input has the task in JSON. The verdict is written to a file, because an answer
may print anything.
"""

import importlib
import json
import operator
import os
import runpy
import sys
import traceback
from pathlib import Path


def verdict(task: dict) -> str:
    """Check an exercise of the four files: "passed", or the question that leads on.

    task    {"number": 3, "checks": a file, "module": "model", "name": "Class.forward",
            "right": a file and a function of the module to take from it, because the
            exercise calls it and that of the copy may be wrong, or None}
    """
    try:
        check = runpy.run_path(task["checks"])["CHECKS"][task["number"] - 1]
        module = importlib.import_module(task["module"])
        if task["right"]:
            file, name = task["right"]
            setattr(module, name, runpy.run_path(file)[name])
        check(operator.attrgetter(task["name"])(module))
    except BaseException as problem:
        # SystemExit and KeyboardInterrupt, too, if an answer raises them.
        return explain(problem, task["checks"])
    return "passed"


def explain(problem: BaseException, checks: str) -> str:
    """Say in a sentence why an answer did not pass."""
    frames = traceback.extract_tb(problem.__traceback__)
    if type(problem) is AssertionError and frames[-1].filename == checks:
        return str(problem)  # the question of a check
    if type(problem) is SystemExit and "is yours to write first" in str(problem):
        return str(problem)
    place = ""
    for frame in frames:
        path = Path(frame.filename)
        if path.parent == Path.cwd():
            place = f" in line {frame.lineno} of {path.name}"
    return (
        f"it stops with {type(problem).__name__}{place}: {problem}. "
        "What should that line do, and what does it do?"
    )


def main() -> None:
    task = json.load(sys.stdin)
    sentence = verdict(task)
    Path(task["file"]).write_text(sentence, encoding="utf-8", errors="replace")
    os._exit(0)  # without waiting for threads of the answer


if __name__ == "__main__":
    main()
