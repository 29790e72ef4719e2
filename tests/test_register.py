"""The code, its documents and tests/studies name the same open points and flags."""

import re

import pytest

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


def test_the_words_before_a_tag_fit_its_letter():
    words = {"A": "UNSPECIFIED", "D": "DEVIATION", "E": "PAPER-ERROR"}
    for file, text in CODE.items():
        for word, letter in re.findall(r"([A-Z-]{9,}) \[([ADE])\d+\]", text):
            assert word == words[letter], file
    numbers = {"A": range(1, 22), "D": range(1, 3), "E": range(1, 11)}
    expected = {f"{letter}{n}" for letter, count in numbers.items() for n in count}
    assert COMMENTS.keys() == tags("".join(CODE.values())) == expected


def test_the_tables_of_the_studies_have_a_row_for_every_tag():
    page = read(ROOT / "tests" / "studies" / "README.md")
    rows = re.findall(r"^\| \[([ADE]\d+)\] \|", page, re.M)
    assert sorted(rows) == sorted(COMMENTS)


def test_the_readme_explains_the_five_points_that_matter_most():
    items = re.findall(r"^- \[(A\d+)\] ", read(ROOT / "README.md"), re.M)
    assert items == ["A5", "A7", "A9", "A10", "A11"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_names_only_tags_and_flags_that_exist(path):
    text = read(path)
    assert tags(text) <= COMMENTS.keys()
    assert set(re.findall(FLAG, text)) <= flags() | FOREIGN


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_of_a_page_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", read(path)):
        name, _, anchor = target.partition("#")
        linked = path.parent / name
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", read(linked), re.M)
            plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
            assert anchor in [words.replace(" ", "-") for words in plain]


def flags():
    """Find the flags that the parsers of the four files and of the scripts declare."""
    text = "".join([*CODE.values(), *map(read, SCRIPTS)])
    declared = re.findall(r'\b(?:add|add_argument|either)\(\s*"(--[a-z-]+)"', text)
    return set(declared)


@pytest.mark.parametrize("file", CODE)
def test_messages_and_comments_name_only_flags_that_exist(file):
    assert set(re.findall(FLAG, CODE[file])) <= flags()


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
