"""Silent bugs to hunt: the code runs and trains with each of them, and is wrong.

    python -m tests.course.hunts hide [N]     put one in, and print what a user reports
    python -m tests.course.hunts reveal       name it, and take it out again
    python -m tests.course.hunts list         for teachers: all bugs with their changes
    python -m tests.course.hunts pack FILE    store bugs in the form that `list` prints

Between hide and reveal, find it: train, read, run the tests. The bugs are packed at the
end of this file, so that reading it gives nothing away.
"""

import base64
import json
import random
import shutil
import sys
import textwrap
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def unpack(packed: str) -> dict[str, tuple[str, list[list[str]]]]:
    """Return the bugs: {fault: (a user's report, changes [file, old, new])}."""
    bugs = json.loads(zlib.decompress(base64.b64decode(packed)))
    return {fault: (report, changes) for fault, report, changes in bugs}


def swap(changes: list[list[str]], root: Path = ROOT, back: bool = False) -> None:
    """Put a bug in, or take it out: all of its changes or none."""
    texts = {}
    for name, old, new in changes:
        if back:
            old, new = new, old
        text = texts.get(name) or (root / name).read_text(encoding="utf-8")
        if text.count(old) != 1:
            sys.exit(f"{name} has changed. git checkout {name}, then try again")
        texts[name] = text.replace(old, new)
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")


def hidden(root: Path = ROOT) -> list[str]:
    """List the bugs that are in the code now."""
    faults = []
    for fault, (_, changes) in BUGS.items():
        is_in = True
        for name, old, new in changes:
            text = (root / name).read_text(encoding="utf-8")
            is_in = is_in and new in text and old not in text
        if is_in:
            faults.append(fault)
    return faults


def forget(root: Path = ROOT) -> None:
    """Delete the cache and the runs on the toy, which other code has made."""
    for folder in (root / "cache", *root.glob("runs/toy*")):
        shutil.rmtree(folder, ignore_errors=True)


def hide(number: int | None, root: Path = ROOT) -> None:
    """Put in one of the bugs, None for any of them, and print what a user reports."""
    if hidden(root):
        sys.exit("There is a bug in the code already. Find it, or reveal it")
    bugs = list(BUGS.values())
    report, changes = random.choice(bugs) if number is None else bugs[number - 1]
    swap(changes, root)
    forget(root)
    print(f"A user reports: {report}\nFind the cause. (git diff would be cheating.)")


def reveal(root: Path = ROOT) -> None:
    """Name the bug that is in, and take it out again."""
    faults = hidden(root)
    if not faults:
        sys.exit("None of these bugs is in the code")
    for fault in faults:
        swap(BUGS[fault][1], root, back=True)
        print(f"It was: {fault}. It is taken out again")
    forget(root)


def pack(path: Path) -> None:
    """Store the bugs of a JSON file, as `list` prints it, at the end of this file."""
    bugs = json.loads(path.read_text(encoding="utf-8"))
    packed = base64.b64encode(zlib.compress(json.dumps(bugs).encode(), 9)).decode()
    lines = "\n".join(textwrap.wrap(packed, 88))
    source = Path(__file__).read_text(encoding="utf-8")
    head, _, tail = source.partition('\nPACKED = """\n')
    _, _, tail = tail.partition('\n"""\n')
    source = f'{head}\nPACKED = """\n{lines}\n"""\n{tail}'
    Path(__file__).write_text(source, encoding="utf-8")


def main(arguments: list[str]) -> None:
    numbers = [str(number) for number in range(1, len(BUGS) + 1)]
    command, *rest = arguments or [""]
    if command == "hide" and not rest:
        hide(None)
    elif command == "hide" and len(rest) == 1 and rest[0] in numbers:
        hide(int(rest[0]))
    elif arguments == ["reveal"]:
        reveal()
    elif arguments == ["list"]:
        print(json.dumps([[fault, *bug] for fault, bug in BUGS.items()], indent=1))
    elif command == "pack" and len(rest) == 1:
        pack(Path(rest[0]))
    else:
        sys.exit(__doc__)


PACKED = """
eNqdVk1v2zgQ/SuzPsmtrY2BPSwC+BC0WaBAui2aLHpwBIOWRhJhiVT5Ydn763eGlGK5cfbQHGKbHA7nzbx5w81m
1omikKqCXHvlLEgFrkbotG54VR/QgJMtzhYwe6y1ceCdQyNUjpbOtAjaO+i1sUgHhYIdltrgAoQqgieD1jcOdEkr
57OQk21FLnrp6mCn6Z8J90sKYydcXqd06WYza3WBTdqdOASOC4tUdB2qImmF3WOxbVGopEThPF22AF7dOGEqdNl8
/vrUaJmGc4Vs1ysyy7KMbpt9vwuR/0MfBsH2fKZgH18UCHBoHVh0MewSe7CimGRkQdkwfLhHRZnqoK8xJjSAAOs0
+4NSqpB02mkHlHgQjRcOB6DPs148z27JkaxqRyBFnnsj8lMy3fXqyn7A8cqdf/vAZP+au5gYBlHgARvdtQzOdij2
RA5pocHSBeIYIRXBYodPP5k32looRdNYaH1e0++emcWMYc8hsWwTiUP5waXz7IxyJgwxomEwMVWFcGLAFa6ENWyM
7oGIB/xJKyObSuKo6bzl/SwdY/5tzbFth5/Z1FEjrUvi6fkUeq6Vw6MjOou8Ruap0/EWKKRodOXRjrhLaQgNcUwF
2r8YADHSEr54TCjLKRgazngVs1Ea3cKkenRjrisl/72CXiorCwwZG2AG11kab4T1+szNYe1/j1m0Vmp1eW5YnCaj
EYSvlkVB5KbyOGQWhCZWOAhA+EllFA0obdrYQXzyRJgpK9/F4eEz1ILyAdyH9FF7VRhqDpYbdieCapy1IVKD1aEa
rhRNL04WbO3dFa0Id1kmxzvSqI5sYsjbELLd3C5XGTds2GJI2+l+duEi0uKKlwuS6I5ip0oRJzRBoELDXhEheS92
1oBrym9NohSos1zyV9hp54gCjHVYYcKwZSUPMa9WkO4q3+4ouAF44O8oksKQgePI36/BkiRRGdlTQqJow7cgi2/s
DIAKozvWdsJJOSZW9LVsaDJQiWTuJm0eenfUi1CWoIydljxQnNbc7LF4V3kd1NAOzdQZvRM72UgnIwnUy41a2TS3
hyuAgf5i5fmCZP6sLleDbcLf10/GI+8PIO9/pJCs5oGjgopMd8aRR7h+eDQydvWn2KSCmkJxINBRQJ7HnNJBcqxv
GSqsrvDQUpPxtInDqpRNkwxDdxFk0Lp5anXpWnEM02i5mv/KsdVL5fJGdhb2iB1HLQ0g942yDmlYxZaixR1WUo1y
/aCJX5PJXujpTB8fBaJDk8JTrS23ecOSy5S0VEmuIE9MauhK6+K1Vh2pi46bW/jw8Onr9vH+w5e/Pz7CO3i8+/z1
4X777e7pPjubLd+2gttsxEnKIXOjl+GxMD5ggqL0NQ38+IiInTU1/HNQKxYpTb1ECFpstTktYEd8l+7lcXJ+v1wh
XRJG2u80/VQSHG+JCHY+T3ci3/fCFMn8ZzNqTHdpMBUPU0Rp5B/BIdrQNGMjykqNwmoxPkq+eWXjEYNxNVahZUPi
8x5fRuyJZFL7pqDCXQGzurm5oTzTFErZC7wH7HRMXtgaf19OxNKHcdEKZ+QxiDmrszhS4JOXEzUPv4r+klUKfyxC
/FG7OPIJ58KszEmIiX6yLFm+wjC0J2JuG2oVv2l1VsFhOl1/REVKbJzxrl5MdCRjXVxNLM5bFB9bDxYEN/sPzrvR
wg==
"""

BUGS = unpack(PACKED)

if __name__ == "__main__":
    main(sys.argv[1:])
