"""The trouble that people really have: each kind, with what they should read.

Public reports of people who do this job named these kinds. A kind that makes results
wrong without a word comes first.
"""

import io
import json
import shutil
from dataclasses import replace

import pytest
import torch

import data
import evaluate
import train
from data import InputError
from model import Upstream
from tests.conftest import write_run, write_wav

HEADER = ["text", "emotion", "session", "dialog", "speaker", "wav"]
WORDS = {"neutral": "paper street", "happy": "lovely", "angry": "hate", "sad": "alone"}


def make_rows():
    """Make 36 rows: three sessions of one dialogue, the four emotions in turn."""
    rows = []
    for number in range(36):
        session = number // 12 + 1
        emotion = list(WORDS)[number % 4]
        text = f"{WORDS[emotion]} {number}"
        speaker = f"{session}{'ab'[number % 2]}"
        rows.append([text, emotion, str(session), f"d{session}", speaker, ""])
    return rows


def write_table(path, rows, separator=",", header=HEADER):
    lines = [separator.join(row) for row in [header, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train_text(table, folder, *flags):
    """Train two epochs on the text of a table, in a folder of its own."""
    train.main(
        ["--corpus", str(table), "--fusion", "text-fc", "--fold", "1", "--max-epochs"]
        + ["2", "--upstream", "tiny", "--out", str(folder / "runs")]
        + ["--cache", str(folder / "cache"), *flags]
    )


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_rows()


# --- Tables ---------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_an_unpaired_quote_does_not_glue_rows_together(rows, tmp_path, separator):
    rows[2][0] = '"well'
    rows[6][0] = 'bye"'
    table = write_table(tmp_path / "t.csv", rows, separator)
    with pytest.raises(InputError, match="line 4: unexpected end .* Check its quotes"):
        data.read_csv(table)


def test_every_label_is_counted_and_others_are_named(rows, tmp_path, capsys):
    for row in rows[:8]:
        row[1] = row[1].replace("angry", "agnry")
    train_text(write_table(tmp_path / "t.csv", rows), tmp_path)
    printed = capsys.readouterr().out
    assert "neu 9, hap 9, ang 7, sad 9" in printed
    assert "only context: {'agnry': 2}" in printed


@pytest.mark.parametrize(
    "rename", ["happy happyness", "neutral 01", "sad 难过", "angry wütend"]
)
def test_a_class_without_utterances_is_an_error(rows, tmp_path, capsys, rename):
    old, new = rename.split()
    for row in rows:
        row[1] = row[1].replace(old, new)
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(
        InputError, match="a class has no utterance.*'happiness', 'joy'"
    ):
        train_text(table, tmp_path, "--fold", "all")
    assert f"'{new}': 9" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_one_recording_of_many_rows_is_refused(rows, tmp_path):
    write_wav(tmp_path / "d.wav", [0.1] * 500)
    rows[1][5] = rows[4][5] = "d.wav"
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(InputError, match="d.wav: it is in line 3 and in line 6"):
        data.read_csv(table)


def test_blanks_inside_a_file_name_stay(rows, tmp_path):
    write_wav(tmp_path / "a  b.wav", [0.1] * 500)
    rows[0][5] = " a  b.wav "
    corpus = data.read_csv(write_table(tmp_path / "t.csv", rows))
    assert corpus[0].wav.name == "a  b.wav"


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        (0, "x" * 200000, "field larger than field limit"),
        (0, '"a"b', "',' expected after"),
        (2, "1.0", "session is '1.0' instead of a number from 1 on"),
        (2, "", "session is '' instead of a number from 1 on"),
        (3, "d\0", "dialog is 'd\\x00' instead of a name"),
        (4, 'a"', "speaker is 'a\"' instead of a name"),
        (5, "a sentence in the column wav " * 20, "File name too long"),
    ],
)
def test_a_bad_cell_is_named_with_its_line(rows, tmp_path, column, cell, message):
    rows[20][column] = cell
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(InputError, match="line 22: ") as problem:
        data.read_csv(table)
    assert message in str(problem.value)
    assert "\n" not in str(problem.value)


def test_a_duplicate_id_is_named_with_both_lines(rows, tmp_path):
    for number, row in enumerate(rows):
        row.append(f"{number}")
    rows[8][6] = rows[7][6]
    table = write_table(tmp_path / "t.csv", rows, header=[*HEADER, "id"])
    with pytest.raises(InputError, match="id d1_7: it is in line 9 and in line 10"):
        data.read_csv(table)


# --- Encoders and the cache -----------------------------------------------------------


@pytest.mark.parametrize(("unknown", "answer"), [(1, ""), (2, "warning"), (6, "error")])
def test_unknown_words_are_measured_on_the_corpus(
    rows, tmp_path, tiny, capsys, unknown, answer
):
    # A text has 8 tokens with [CLS] and [SEP], and the tiny BERT has no Chinese words.
    corpus = data.read_csv(write_table(tmp_path / "t.csv", rows[:4]))
    for number, utterance in enumerate(corpus):
        words = ["难"] * unknown + ["a"] * (6 - unknown)
        if number > 1 and unknown == 1:
            words = ["a"] * 6
        corpus[number] = replace(utterance, text=" ".join(words))
    if answer == "error":
        with pytest.raises(InputError, match="75% of all tokens.*--bert"):
            data.prepare(tiny["text"], corpus, 1)
    else:
        data.prepare(tiny["text"], corpus, 1)
        assert capsys.readouterr().out.startswith(answer)


def test_a_cap_in_the_tokenizers_configuration_does_not_cut_texts(
    tiny_folder, tmp_path
):
    folder = shutil.copytree(tiny_folder / "text", tmp_path / "text")
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "model_max_length": 2}))
    assert len(Upstream(str(folder), "text").prepare("a b c d")) == 6


@pytest.mark.parametrize("change", ["hidden_act", "num_attention_heads", "moved"])
def test_the_cache_knows_all_that_shapes_a_state(tiny_folder, tmp_path, change):
    folder = shutil.copytree(tiny_folder / "text", tmp_path / "elsewhere" / "text")
    config = json.loads((folder / "config.json").read_text())
    other = {"hidden_act": "relu", "num_attention_heads": 4, "moved": None}[change]
    if other:
        config[change] = other
    (folder / "config.json").write_text(json.dumps(config))
    before = Upstream(str(tiny_folder / "text"), "text").checksum
    after = Upstream(str(folder), "text").checksum
    assert (before == after) == (change == "moved")


def test_two_jobs_never_write_the_same_part_file(tmp_path):
    with data.write_whole(tmp_path / "x") as first:
        with data.write_whole(tmp_path / "x") as second:
            assert first != second
            second.write_text("second")
        first.write_text("first")
    assert (tmp_path / "x").read_text() == "first"


def test_an_upstream_that_moved_is_found_by_its_new_place(rows, tmp_path, tiny_folder):
    bert = shutil.copytree(tiny_folder / "text", tmp_path / "bert")
    table = write_table(tmp_path / "t.csv", rows)
    train_text(table, tmp_path, "--upstream", "paper", "--bert", str(bert))
    folder = next((tmp_path / "runs").rglob("result.json")).parent
    before = evaluate.Recognizer(folder).recognize(text="lovely")
    bert.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="new path into the run's config.json"):
        evaluate.Recognizer(folder)
    config = folder / "config.json"
    place = json.dumps(str(tmp_path / "moved"))
    config.write_text(config.read_text().replace(json.dumps(str(bert)), place))
    assert evaluate.Recognizer(folder).recognize(text="lovely") == before


def test_half_deleted_tiny_upstreams_say_which_folder_may_go(rows, tmp_path):
    table = write_table(tmp_path / "t.csv", rows)
    train_text(table, tmp_path)
    tiny = next((tmp_path / "cache").glob("tiny-*"))
    (tiny / "text" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=f"{tiny.name}.*Delete a folder tiny-..."):
        train_text(table, tmp_path, "--fold", "2")


def test_a_half_deleted_toy_says_which_folder_may_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.write_toy(train.TOY)
    next(train.TOY.rglob("*.wav")).unlink()
    with pytest.raises(
        InputError, match=f"Delete {train.TOY}, then: python data.py toy"
    ):
        train.main(["--out", "runs", "--cache", "cache"])


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(InputError) as problem:
        train.main(["--iemocap", str(tmp_path), "--partial"])
    assert str(problem.value) == (
        f"{tmp_path}: no Session1, Session2, ... in it. Name their folder"
    )


# --- Runs and tables ------------------------------------------------------------------


def test_runs_of_unlike_corpora_are_not_in_one_mean(tmp_path):
    write_run(tmp_path / "a", fold=1)
    write_run(tmp_path / "b", fold=2)
    write_run(tmp_path / "c", fold=3, corpus_checksum="1")
    runs, problems = evaluate.find_runs(tmp_path)
    assert [run.folder.name for run in runs] == ["a", "b"]
    assert problems == [
        f"{tmp_path / 'c'}: left out, on another corpus than {runs[0].folder}"
    ]


def test_a_checkpoint_of_another_run_is_refused(rows, tmp_path):
    table = write_table(tmp_path / "t.csv", rows)
    train_text(table, tmp_path, "--fold", "1", "2", "--max-epochs", "1")
    first, second = sorted((tmp_path / "runs").rglob("fold*"))
    (first / "result.json").unlink()
    (first / "checkpoint.pt").write_bytes((second / "checkpoint.pt").read_bytes())
    with pytest.raises(InputError, match="belongs to the run .*'fold': 2"):
        train_text(table, tmp_path, "--max-epochs", "1")
    assert (second / "result.json").exists()


def test_a_folder_that_is_no_run_names_the_runs_below_it(tmp_path):
    run = write_run(tmp_path / "runs" / "toy" / "fold5-seed0")
    with pytest.raises(InputError) as problem:
        evaluate.Recognizer(tmp_path / "runs")
    assert str(run) in str(problem.value)
    assert "delete" not in str(problem.value)


def test_a_picture_can_have_any_title(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    write_run(tmp_path / "runs", corpus="cost$ of $x_1", title="cost$ of $x_1")
    runs, _ = evaluate.find_runs(tmp_path)
    evaluate.draw(runs, tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


def test_a_dry_run_says_tiny_beside_its_result(rows, tmp_path, capsys):
    table = write_table(tmp_path / "t.csv", rows)
    train_text(table, tmp_path)
    evaluate.main(["tables", str(tmp_path / "runs")])
    printed = capsys.readouterr().out.splitlines()
    for line in printed:
        if "on the test session" in line or "Table 1" in line:
            assert "upstream=tiny" in line
    folder = next((tmp_path / "runs").rglob("result.json")).parent
    evaluate.main(["recognize", str(folder), "--text", "lovely"])
    for line in capsys.readouterr().out.splitlines():
        assert line.startswith("t, upstream=tiny")


def test_out_of_gpu_memory_keeps_the_checkpoint(rows, tmp_path, monkeypatch, capsys):
    table = write_table(tmp_path / "t.csv", rows)
    flags = ["--finetune-after", "1", "--max-epochs", "4", "--lr-frozen", "0"]
    train_epoch = train.train_epoch

    def fail(model, optimizer, *rest):
        if optimizer.param_groups[0]["lr"] == 1e-5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_epoch(model, optimizer, *rest)

    monkeypatch.setattr(train, "train_epoch", fail)
    with pytest.raises(SystemExit, match="out of GPU memory. Add --micro-batch 8"):
        data.run_command(lambda: train_text(table, tmp_path, *flags))
    monkeypatch.setattr(train, "train_epoch", train_epoch)
    train_text(table, tmp_path, *flags, "--micro-batch", "8")
    assert "resuming after epoch 2" in capsys.readouterr().out
    log = next((tmp_path / "runs").rglob("log.jsonl")).read_text().splitlines()
    assert [json.loads(line)["phase"] for line in log] == ["frozen"] * 2 + [
        "finetune"
    ] * 2


@pytest.mark.parametrize(
    ("gibibytes", "fits"), [(8, 5), (16, 17), (24, 28), (80, None)]
)
def test_a_small_gpu_is_warned_of_before_training(monkeypatch, capsys, gibibytes, fits):
    # 4 GiB and 0.7 GiB a clip, of the whole card: 4 + 32 * 0.7 = 26.4 GiB.
    size = (0, gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: size)
    args = train.parse_args(["--iemocap", "x"])
    args.device = "cuda"
    train.warn_of_memory(args, False, {"audio": None, "text": None})
    printed = capsys.readouterr().out
    assert printed.strip().endswith(f"--micro-batch {fits}" if fits else "")


def test_a_terminal_without_unicode_gets_question_marks(monkeypatch):
    """Tables have → and ±, which the terminal of some clusters does not know."""
    screens = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr("sys.stdout", screens[0])
    monkeypatch.setattr("sys.stderr", screens[1])
    data.run_command(lambda: print("CMT(A→T) 1 ± 2"))
    assert screens[0].buffer.getvalue().decode() == "CMT(A?T) 1 ? 2\n"


# --- A student's own mistakes ---------------------------------------------------------

MISSPELT = [
    ("data.py", "file.readframes(n)", "file.readframe(n)"),
    ("data.py", "x.unfold(0, WINDOW, WINDOW)", "x.unfolds(0, WINDOW, WINDOW)"),
    ("data.py", "read_text(path).split", "read_txt(path).split"),
    ("data.py", "windows[row, column] = other", "window[row, column] = other"),
    ("data.py", "lengths[exists] =", "length[exists] ="),
    ("model.py", "self.preprocessor(raw,", "self.preprocesor(raw,"),
    ("model.py", "pad_sequence(inputs", "pad_sequences(inputs"),
    ("model.py", "states.mean(dim=-1)", "states.means(dim=-1)"),
    ("train.py", "patience.step(dev", "patience.steps(dev"),
    ("evaluate.py", "row.argmax()", "row.argmaxx()"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "right", "wrong"), MISSPELT)
def test_a_misspelt_name_is_a_traceback_that_shows_the_line(
    small_corpus, tmp_path, monkeypatch, file, right, wrong
):
    """No message about a file of the user's hides a mistake in the code."""
    import importlib.util
    import sys
    import traceback

    from tests.conftest import ROOT

    # Load copies of the four files, one of them with the mistake.
    for name in ("model", "data", "evaluate", "train"):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        if file == f"{name}.py":
            assert source.count(right) >= 1
            source = source.replace(right, wrong, 1)
        path = tmp_path / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    command = ["--iemocap", str(small_corpus), "--partial", "--upstream", "tiny"]
    command += ["--max-epochs", "1", "--out", str(tmp_path / "runs")]
    command += ["--cache", str(tmp_path / "cache")]
    with pytest.raises((NameError, AttributeError)) as mistake:
        sys.modules["data"].run_command(lambda: sys.modules["train"].main(command))
    frames = traceback.extract_tb(mistake.value.__traceback__)
    lines = [frame.line for frame in frames if frame.filename == str(tmp_path / file)]
    assert any(wrong.split("(")[0].split(" ")[0] in line for line in lines)
