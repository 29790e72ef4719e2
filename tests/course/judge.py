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
from collections.abc import Callable
from pathlib import Path


def verdict(task: dict) -> str:
    """Check an exercise of the four files: "passed", or the question that leads on.

    task    {"number": 3, "checks": a file, "module": "model", "name": "Class.forward",
            "right": a file and a function of the module to take from it, because the
            exercise calls it and that of the copy may be wrong, or None}
    """
    answer = None
    try:
        check = runpy.run_path(task["checks"])["CHECKS"][task["number"] - 1]
        module = importlib.import_module(task["module"])
        if task["right"]:
            file, name = task["right"]
            setattr(module, name, runpy.run_path(file)[name])
        answer = operator.attrgetter(task["name"])(module)
        check(answer)
    except BaseException as problem:
        # SystemExit and KeyboardInterrupt, too, if an answer raises them.
        return explain(problem, task["checks"], answer)
    return "passed"


def explain(problem: BaseException, checks: str, answer: Callable | None) -> str:
    """Say in a sentence why an answer did not pass.

    The sentence names the last line of the answer that the traceback passes. If the
    answer has not started, it names the last line of the copy.
    """
    frames = list(traceback.walk_tb(problem.__traceback__))
    last, _ = frames[-1]
    if type(problem) is AssertionError and last.f_code.co_filename == checks:
        return str(problem)  # the question of a check
    if type(problem) is SystemExit and "is yours to write first" in str(problem):
        return str(problem)
    code = getattr(answer, "__code__", None)
    lines_of_answer = [pair for pair in frames if pair[0].f_code is code]
    place = ""
    for frame, line in lines_of_answer or frames:
        path = Path(frame.f_code.co_filename)
        if path.parent == Path.cwd():
            place = f" in line {line} of {path.name}"
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
