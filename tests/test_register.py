"""The code, its documents and tests/studies name the same open points and flags."""

import re

from tests.conftest import ROOT

CODE = {}
for file in ("model.py", "data.py", "train.py", "evaluate.py"):
    CODE[file] = (ROOT / file).read_text(encoding="utf-8")
SCRIPTS = [*ROOT.glob("tests/course/*.py"), *ROOT.glob("tests/studies/*.py")]
SCRIPTS = sorted(path for path in SCRIPTS if not path.name.startswith("test_"))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("tests/**/*.md"))]
FLAG = r"(?<![-\w])--[a-z][-a-z]+"
# Flags of pip and of SLURM.
FOREIGN = {"--index-url", "--array"}


def read(path):
    return path.read_text(encoding="utf-8")


def tags(text):
    """Find [A1], [D1] and [E1] in a text."""
    return set(re.findall(r"\[([ADE]\d+)\]", text))


def explanations(text):
    """Find the comments that begin with a tag, as {tag: their words}."""
    word = "(?:UNSPECIFIED|DEVIATION|PAPER-ERROR)"
    # A comment ends before the next tag, and before a line that is not a comment.
    pattern = rf"{word} \[(\w+)\](.*?)(?={word}|\n\s*[^#\s])"
    found = {}
    for tag, comment in re.findall(pattern, text, re.S):
        words = " ".join(comment.replace("#", "").split())
        found[tag] = f"{found.get(tag, '')} {words}"
    return found


COMMENTS = explanations("\n".join(CODE.values()))


def test_every_tag_of_the_code_is_explained_there_and_in_the_readme():
    """The word before a tag fits its letter, and the README has a row for each."""
    words = {"A": "UNSPECIFIED", "D": "DEVIATION", "E": "PAPER-ERROR"}
    for file, text in CODE.items():
        for word, letter in re.findall(r"([A-Z-]{9,}) \[([ADE])\d+\]", text):
            assert word == words[letter], file
    numbers = {"A": range(1, 22), "D": range(1, 3), "E": range(1, 11)}
    expected = {f"{letter}{n}" for letter, count in numbers.items() for n in count}
    assert COMMENTS.keys() == tags("".join(CODE.values())) == expected
    rows = re.findall(r"^\[([ADE]\d+)\] \|", read(ROOT / "README.md"), re.M)
    assert sorted(rows) == sorted(COMMENTS)


def test_the_code_and_the_pages_name_only_flags_and_tags_that_exist():
    """A flag exists if a parser of the four files or of a script declares it."""
    declared = "".join([*CODE.values(), *map(read, SCRIPTS)])
    flags = set(re.findall(r'\badd(?:_argument)?\(\s*"(--[a-z-]+)"', declared))
    for path in [*PAGES, *[ROOT / file for file in CODE]]:
        named = set(re.findall(FLAG, read(path)))
        assert named <= flags | FOREIGN, path
        assert tags(read(path)) <= COMMENTS.keys(), path


def test_every_open_point_has_another_reading_in_the_code_and_a_patch():
    """The patches are in tests/studies/alternatives.py."""
    points = {tag for tag in COMMENTS if tag.startswith("A")}
    for tag in points:
        assert "another" in COMMENTS[tag].lower(), tag
    patches = read(ROOT / "tests" / "studies" / "alternatives.py")
    assert tags(patches) == points


def test_the_exercises_are_numbered_from_1_to_9():
    """Each names its minutes and the command that checks it."""
    pattern = r"EXERCISE (\d+) \(\d+ min\): .*; pytest -m ex(\d+)"
    found = re.findall(pattern, "".join(CODE.values()))
    assert sorted(found) == [(str(n), str(n)) for n in range(1, 10)]
