"""Silent bugs to hunt: the code runs and trains with each of them, and is wrong.

    python tests/bugs.py hide [N]    put one into the code, and print what a user reports
    python tests/bugs.py reveal      tell which it was, and take it out again
    python tests/bugs.py list        for teachers: every bug, its report, its change
    python tests/bugs.py pack FILE   for teachers: store the bugs of a JSON file, as `list` prints it

Between hide and reveal, find it: train, read, run the tests. The bugs are packed at the end of this
file, so that reading it gives nothing away.
"""

import base64
import json
import random
import shutil
import sys
import textwrap
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def unpack(text):
    """Return the bugs: what is wrong -> (a user's report, its changes: [file, old, new] each)."""
    hunts = json.loads(zlib.decompress(base64.b64decode(text)))
    return {what: (report, changes) for what, report, changes in hunts}


def swap(changes, root=ROOT, back=False):
    """Put a bug in, or take it out: all of its changes or none."""
    texts = {name: (root / name).read_text(encoding="utf-8") for name, _, _ in changes}
    for name, old, new in changes:
        old, new = (new, old) if back else (old, new)
        if texts[name].count(old) != 1:
            sys.exit(f"{name} is not as this bug expects it: git checkout {name}, then try again")
        texts[name] = texts[name].replace(old, new)
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")


def hidden(root=ROOT):
    """List the bugs that are in the code now."""
    text = {p.name: p.read_text(encoding="utf-8") for p in root.glob("*.py")}
    return [what for what, (_, changes) in BUGS.items()
            if all(new in text[name] and old not in text[name] for name, old, new in changes)]


def forget(root=ROOT):
    """Delete the toy's runs and the cache, because neither knows the code that made it."""
    for folder in (root / "cache", *root.glob("runs/toy*")):
        shutil.rmtree(folder, ignore_errors=True)


def main(command, root=ROOT):
    if command[:1] == ["hide"] and all(x.isdigit() and 0 < int(x) <= len(BUGS) for x in command[1:]):
        if hidden(root):
            sys.exit("There is one in the code already: find it, or reveal it.")
        bugs = list(BUGS.values())
        report, changes = bugs[int(command[1]) - 1] if command[1:] else random.choice(bugs)
        swap(changes, root)
        forget(root)
        print(f"A user reports: {report}\nFind the cause. (git diff would be cheating.)")
    elif command == ["reveal"]:
        for what in hidden(root) or sys.exit("No bug of ours is in the code."):
            swap(BUGS[what][1], root, back=True)
            forget(root)
            print(f"It was: {what}. The code is whole again; what you trained meanwhile is not.")
    elif command == ["list"]:
        print(json.dumps([[what, *rest] for what, rest in BUGS.items()], indent=1))
    elif command[:1] == ["pack"] and len(command) == 2:
        hunts = json.loads(Path(command[1]).read_text(encoding="utf-8"))
        text = base64.b64encode(zlib.compress(json.dumps(hunts).encode(), 9)).decode()
        source, lines = Path(__file__).read_text(encoding="utf-8"), "\n".join(textwrap.wrap(text, 96))
        head, tail = source.split("\nPACKED = ")[0], source.split('\n"""\n\nBUGS')[-1]
        Path(__file__).write_text(f'{head}\nPACKED = """\n{lines}\n"""\n\nBUGS{tail}', encoding="utf-8")
    else:
        sys.exit(__doc__)


PACKED = """
eNqVVm1v4zYM/itcBmx2kXjNfRoKZEBxK4YD2t7h2uE+pEagWIwtxJZ8eqkb7M+PlJzUt2bDrR8a2yIpPuLzkFqvZ72QUuka
KhO0d6A0+AahN6blr+YZLXjV4WwOs4fGWA/Be7RCV+jIp0MwwcNgrENyFBq2uDMW5yC0jJEsutB6MDv68uoLFdnWFGJQvol2
hv7ZuL+iNLbCV01Bm67Xs85IbIv+wClwXigL0feoZdYJt0e56VDorJkDv669sDX6Ms/fmjdFtJSqWy1pvSxLij/7ch1z/ZN+
LIIb2Fiy80cNAjw6Dw59SnSHAzghJ2cwJ/yWnQfUdDY9DA2mI4xpg/OG48FO6XjMtNKNuPBZtEF4HKFZ9MFq+OtpNoin2RUM
Yg5PsxCfg5ifMwkTEzI/IuLdJT5ja/qOs3I9ij3VUTlocedjja1QmvLhqI//MG+Nc7ATbeugC1VD7wOTgIvLkeOJsE2qMQHD
hQ8cjMAKS8VrGVTCKIUXI764JaxgHYAYAoHTsBxL7SAUxxx/WHEum/G1nDq2yvmMPfIp0Mpojy+eQomqQSaQN4lMIJVoTR3Q
HVHulKX94hkyH08GQIxxhCa5Ce0Y8KgEG/RI7AM0DDgSYVK7t0iVdkoi/LQaN1gPVHwzuKJqRddnl3PQsIBlXsLqZHI1h3uj
sTzrf1yE31ZwOQXfCsLTKCmJc3T4HrnGUU0aRyXGVyqSaEEb2yVis+eBMNIpfBHPt3eEjPADy4N+mqClJc6y7jmciPJ9FWkq
PMu0HrcU7SAODlwT/BnRZhfUI3paSpluYqZufbVYliyfuMRINtP1qN9zflP8pqccleNaG0qVCgh7bYaY64CqbvyY/5SlhppB
pMRiwY+wNd6bLmIavzAR2LJWz+n8nKBGp0O3JfQjwMjKESDzubaG1E+k4QjUc5gg6LKc6R3Xyu+xZATpc3nEKa3puccSejpi
o6nDqJY6NFVIVX6i4ZgkaaDa94ZUELN3oxSO1kY7YKHE2r426ahpUVXBiuoQCxpbXYxDJ2gMN4HzbQvoLxWbFwgF/EgoYMz6
W4t4Zm9MRpw3XwvIlnlkqSCtc+5x+lB+XwNalXT8IclSUAfWjAd6whV44lBIS7V3oeOUYXmGid5YGitEhp3JXEXqcIX0hx7z
olM6L5zZ+U68xAmxWOb/02N56ktVq3oHe8Sec1UWaPrMY23T6xZrpY/t99YQ0yZDVZrpOD3OY9GjLeCxMY6FTdUgShM5HVL/
ky6OLpJwbYx8249eqHm+rK/g/e2HT5uHm/cf739/gAt4uL77dHuz+Xz9eFO+mi3+3QquTqSkXqEqaxZxTh/vDrGHDA2N3DS/
k8amhr+O/YnbkiHCEoIOO2MPc9gSxZU/3Qterw5n9JbFEXUBWYs662nm5PAL8DPV3+V5XmxFtR+ElVmsIVtPP00biJWpDfJL
zJFHSK250En5mC4DnwMpJ9pZTF/ToXfcYomuezxNyAP1QRNaSXU6k3vacQWJWH+Q1K2g54wIJXQQ7YZjZ3SJcQU/5d/vc3lC
dlfdYyfszy4Jm5s7DwQvVBux0AK+iMqn5dQn/KAqjJeZfhE70n/eUoj82bKgSfaOysBxqQDvLi50fs7mm3VKsfwbl6aDxw==
"""

BUGS = unpack(PACKED)

if __name__ == "__main__":
    main(sys.argv[1:])
