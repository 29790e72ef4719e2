"""The code, its documents and tests/studies name the same open points and flags."""

import re

import pytest

from tests.conftest import ROOT


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def tags(text):
    """Find [A1], [D1] and [E1] in a text."""
    return set(re.findall(r"\[([ADE]\d+)\]", text))


def flags(text):
    return set(re.findall(r"(?<![-\w])--[a-z][-a-z]+", text))


CODE = {name: read(name) for name in ("model.py", "data.py", "train.py", "evaluate.py")}
ALL_CODE = "\n".join(CODE.values())
# The comments that begin with a tag. A comment ends before the next tag, and before a
# line that is not a comment.
BEGIN = "(UNSPECIFIED|DEVIATION|PAPER-ERROR)"
COMMENTS = re.findall(rf"{BEGIN} \[(\w+)\](.*?)(?={BEGIN}|\n\s*[^#\s])", ALL_CODE, re.S)
SCRIPTS = [*ROOT.glob("tests/course/*.py"), *ROOT.glob("tests/studies/*.py")]
SCRIPTS = [read(path) for path in SCRIPTS if not path.name.startswith("test_")]
DECLARED = r'\b(?:add|add_argument|either)\(\s*"(--[a-z-]+)"'
FLAGS = set(re.findall(DECLARED, "\n".join([ALL_CODE, *SCRIPTS])))
FLAGS |= {"--index-url", "--array"}  # of pip and of SLURM
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("tests/**/*.md"))]
PAGES = [path.relative_to(ROOT) for path in PAGES]


def test_every_tag_is_explained_and_the_words_before_it_fit_its_letter():
    numbers = {"A": range(1, 22), "D": range(1, 3), "E": range(1, 11)}
    expected = {f"{letter}{n}" for letter, count in numbers.items() for n in count}
    assert {tag for _, tag, *_ in COMMENTS} == tags(ALL_CODE) == expected
    words = {"A": "UNSPECIFIED", "D": "DEVIATION", "E": "PAPER-ERROR"}
    for word, tag, *_ in COMMENTS:
        assert word == words[tag[0]], tag


def test_every_open_point_has_another_reading_a_patch_and_a_row_in_the_studies():
    points = {tag for tag in tags(ALL_CODE) if tag.startswith("A")}
    others = {tag for _, tag, text, _ in COMMENTS if "another" in text.lower()}
    assert points <= others
    assert tags(read("tests/studies/alternatives.py")) == points
    page = read("tests/studies/README.md")
    rows = re.findall(r"^\| \[([ADE]\d+)\] \|", page, re.M)
    assert sorted(rows) == sorted(tags(ALL_CODE))


def test_the_readme_explains_the_five_points_that_matter_most():
    items = re.findall(r"^- \[(A\d+)\] ", read("README.md"), re.M)
    assert items == ["A5", "A7", "A9", "A10", "A11"]


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=str)
def test_a_file_names_only_tags_and_flags_that_exist(path):
    assert tags(read(path)) <= tags(ALL_CODE)
    assert flags(read(path)) <= FLAGS


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_the_links_of_a_page_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", read(path)):
        name, _, anchor = target.partition("#")
        linked = (ROOT / path).parent / name
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", read(linked), re.M)
            plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
            assert anchor in [words.replace(" ", "-") for words in plain]
