"""train.py: the triggers on written-out losses, and whole runs on a small corpus."""

import csv
import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

import data
import evaluate
import train
from conftest import ROOT, write_wav
from model import FUSIONS, Config, EmotionRecognizer, Upstream
from train import Patience


def events(losses, **settings):
    patience = Patience(**settings)
    return "".join(patience.step(x)[0] for x in losses)  # c, f, s


# --- the triggers of §3.2


def test_fine_tuning_after_5_and_stop_after_10_on_one_counter():
    assert events([1.0] + [2.0] * 10) == "c" + "ccccf" + "cccc" + "s"


def test_a_lower_loss_sets_the_counter_back_and_fine_tuning_goes_on():
    assert events([1.0] + [2] * 4 + [0.9] + [2] * 10) == "c" + "cccc" + "c" + "ccccf" + "cccc" + "s"
    # Lower in fine-tuning: 10 more epochs, no second trigger.
    assert events([1.0] + [2] * 6 + [0.9] + [2] * 10) == "c" + "ccccfc" + "c" + "c" * 9 + "s"


def test_equal_is_not_lower_and_nan_is_not_either():
    assert events([1.0] * 11) == "c" + "ccccf" + "cccc" + "s"
    assert events([1.0] + [float("nan")] * 10) == "c" + "ccccf" + "cccc" + "s"


def test_a_frozen_system_only_stops():
    assert events([1.0] + [2.0] * 10, finetune_after=None) == "c" + "c" * 9 + "s"


def test_the_counter_can_start_anew_at_the_trigger():  # the other reading of A9
    assert events([1.0] + [2.0] * 15, reset_at_finetune=True) == "c" + "ccccf" + "c" * 9 + "s"
    assert (
        events([3, 2, 1, 1, 1, 1], finetune_after=2, stop_after=2, reset_at_finetune=True)[-1]
        == "s"
    )


def test_the_docstrings_example():
    losses = [1.0, 0.8, 0.9, 0.8, 0.7, 0.8, 0.8, 0.8, 0.8]
    assert events(losses, finetune_after=2, stop_after=4) == "cc" + "cf" + "c" + "ccc" + "s"


# --- whole runs


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory, small_corpus):
    """Folders of tiny upstreams whose vocabulary is not made from the corpus."""
    import model

    words = ["paper street lovely party hate it all alone oh no 1 2 3 4 5 6 7 8 9 10 11 12 13"]
    return model.make_tiny_upstreams(str(tmp_path_factory.mktemp("upstreams")), words)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def go(monkeypatch, small_corpus, upstreams, workplace):
    """Run train.py in a folder of its own, with impatient triggers: go(out, arguments) -> run folder."""
    monkeypatch.chdir(workplace)

    def run(out, *arguments, root=small_corpus, device="cpu"):
        train.main([
            "--iemocap", str(root), "--partial", "--finetune-after", "2", "--stop-after", "4", "--wavlm", upstreams["audio"], "--bert",
            upstreams["text"], "--device", device, "--out", str(workplace / out), *arguments,
        ])  # fmt: skip
        return sorted((workplace / out).rglob("config.json"))[-1].parent

    return run


def timeless(folder):
    """The log and the result without their clocks and memory, and the predictions."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for row in (*log, result):
        row.pop("seconds")
    return log, result, (folder / "predictions.csv").read_text()


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_run_from_end_to_end(go, small_corpus, capsys):
    folder = go("end-to-end", "--fusion", "mmt", "--fold", "5")
    system = "mmt-finetuned-wavlm=audio-bert=text-finetune_after=2-stop_after=4"
    assert folder.parts[-3:] == ("small-partial", system, "fold5-seed0")
    assert set(result_of(folder)) == {
        "corpus", "fusion", "frozen", "fold", "seed", "wa", "ua", "loss", "confusion", "epochs",
        "finetune_epoch", "dev_speaker", "n_train", "n_dev", "n_test", "seconds",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert {f.name for f in fields(train.Settings)} < set(config)
    assert config["switches"].keys() == {"wavlm", "bert", "finetune_after", "stop_after"}
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "predictions.csv", "result.json"):
        assert (folder / name).stat().st_size > 0, name
    log, result, _ = timeless(folder)
    assert [row["epoch"] for row in log] == list(range(1, len(log) + 1))
    assert set(log[0]) == {
        "epoch", "phase", "lr", "train_loss", "dev_loss", "dev_wa", "dev_ua", "since_best"
    }  # fmt: skip
    phases = [(row["phase"], row["lr"]) for row in log]
    k = result["finetune_epoch"]
    assert phases == [("frozen", 1e-3)] * k + [("finetune", 1e-5)] * (len(log) - k) and 0 < k < len(
        log
    )
    assert log[-1]["since_best"] == 4 and result["epochs"] == len(log)

    # The result, counted again from the predictions and from the label files.
    truth = {u.id: u for u in data.read_iemocap(small_corpus)}
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["utterance"] for r in rows} == {
        u.id for u in truth.values() if u.session == 5 and u.emotion != "fru"
    }
    right, by_class = 0, {}
    for r in rows:
        p = [float(r[c]) for c in ("neu", "hap", "ang", "sad")]
        assert (
            abs(sum(p) - 1) < 1e-5
            and r["prediction"] == ("neu", "hap", "ang", "sad")[p.index(max(p))]
        )
        assert (
            r["label"] == truth[r["utterance"]].emotion
            and r["speaker"] == truth[r["utterance"]].speaker
        )
        right += r["label"] == r["prediction"]
        by_class.setdefault(r["label"], []).append(r["label"] == r["prediction"])
    assert result["wa"] == pytest.approx(right / len(rows))
    assert result["ua"] == pytest.approx(
        sum(sum(v) / len(v) for v in by_class.values()) / len(by_class)
    )
    assert result["n_test"] == len(rows) and sum(map(sum, result["confusion"])) == len(rows)
    assert result["n_train"] + result["n_dev"] + result["n_test"] == sum(
        u.label is not None for u in truth.values()
    )
    assert result["corpus"] == "small-partial" and result["dev_speaker"][:5] != "Ses05"

    said = capsys.readouterr().out
    assert "on cpu" in said and "fine-tuning starts" in said and "training stops" in said and "small-partial: WA" in said
    go("end-to-end", "--fusion", "mmt", "--fold", "5")
    assert "done before" in capsys.readouterr().out


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_to_the_same_bits(go, monkeypatch):
    whole = timeless(go("whole", "--fusion", "ef"))
    write, calls, deaths = data.write_whole, [], []

    def dying_write(path, content):
        write(path, content)
        calls.append(path.name)
        if path.name == "checkpoint.pt":
            fine = torch.load(path, weights_only=True)["finetune_epoch"] is not None
            if deaths.count(fine) < 2:  # twice in both phases
                deaths.append(fine)
                raise Killed

    monkeypatch.setattr(data, "write_whole", dying_write)
    for _ in range(6):
        try:
            folder = go("killed", "--fusion", "ef")
            break
        except Killed:
            pass
    assert deaths == [False, False, True, True]
    assert timeless(folder) == whole


def test_same_seed_same_bits_other_seed_other_result(go, workplace):
    first = timeless(go("s1", "--fusion", "text-fc", "--seed", "3"))
    assert timeless(go("s2", "--fusion", "text-fc", "--seed", "3")) == first
    assert timeless(go("s3", "--fusion", "text-fc", "--seed", "4"))[0] != first[0]


def test_only_what_the_paper_opens_is_ever_changed(go, monkeypatch):
    seen, made, before = {}, {}, {}
    step, close = torch.optim.AdamW.step, Upstream.close

    def watch(optimizer, *args):
        group = optimizer.param_groups[-1]
        ids = {id(p) for g in optimizer.param_groups for p in g["params"]}
        seen.setdefault(group["lr"], set()).update(ids)
        assert {g["weight_decay"] for g in optimizer.param_groups} == {1e-3}
        return step(optimizer, *args)

    def first_close(upstream):  # train() calls it before the first epoch
        close(upstream)
        made[upstream.modality] = upstream
        before[upstream.modality] = {n: p.clone() for n, p in upstream.model.named_parameters()}

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    monkeypatch.setattr(Upstream, "close", first_close)
    go("opened", "--fusion", "mmt")
    head, all_of_it = seen[1e-3], seen[1e-5]
    assert head < all_of_it
    parts = {"audio": "feature_extractor.", "text": "embeddings."}
    opened = set()
    for m, part in parts.items():
        for name, p in made[m].model.named_parameters():
            same = torch.equal(p, before[m][name])
            # BERT's rows that no input used move by weight decay alone.
            assert same != name.startswith(part), name
            opened |= {id(p)} if name.startswith(part) else set()
    assert all_of_it - head == opened
    close(made["audio"])  # a later run of the same command starts from the pre-trained weights
    for name, p in made["audio"].model.named_parameters():
        assert torch.equal(p, before["audio"][name]) and not p.requires_grad, name


def test_the_test_session_changes_nothing_in_training(go, small_corpus, tmp_path):
    clean = timeless(go("clean", "--fusion", "mmt"))[0]
    for session in small_corpus.glob("Session[1-4]"):
        (tmp_path / "small").mkdir(exist_ok=True)
        (tmp_path / "small" / session.name).symlink_to(session)
    source = small_corpus / "Session5"
    for old in source.rglob("*"):
        new = tmp_path / "small" / "Session5" / old.relative_to(source)
        if old.is_dir():
            new.mkdir(parents=True, exist_ok=True)
        elif old.suffix == ".wav":
            with_wave = data.load_wav(old)
            write_wav(new, (torch.rand(len(with_wave)) - 0.5).tolist())  # noise
        elif "Emo" in str(old):  # all labels wrong
            swap = {"neu": "ang", "ang": "neu", "hap": "sad", "sad": "hap"}
            words = [swap.get(w, w) for w in old.read_text().split("\t")]
            new.write_text("\t".join(words))
        else:
            new.write_text(old.read_text().replace("hate", "love"))
    poisoned = timeless(go("poisoned", "--fusion", "mmt", root=tmp_path / "small"))[0]
    assert poisoned == clean


def test_best_predicts_with_the_weights_it_kept(go):
    folder = go("best-predicts", "--fusion", "text-fc", "--select", "best", "--frozen")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    lowest = min(state["log"], key=lambda row: row["dev_loss"])
    assert lowest["epoch"] < len(state["log"])  # the last epoch is not the best
    last = go("last-predicts", "--fusion", "text-fc", "--frozen")
    assert (folder / "predictions.csv").read_text() != (last / "predictions.csv").read_text()
    # Give the last run the best weights for its last ones, and let it test again.
    other = torch.load(last / "checkpoint.pt", weights_only=True)
    other["weights"] = state["selected"]["weights"]
    torch.save(other, last / "checkpoint.pt")
    (last / "result.json").unlink()
    go("last-predicts", "--fusion", "text-fc", "--frozen")
    assert (folder / "predictions.csv").read_text() == (last / "predictions.csv").read_text()


def test_the_papers_numbers_are_the_defaults():
    _, given = train.parse([])
    assert given == {"fold": [5], "seed": [0]}
    s = train.Settings()
    assert (s.fusion, s.frozen, s.wavlm, s.bert) == (
        "mmt", False, "microsoft/wavlm-large", "bert-base-uncased"
    )  # fmt: skip
    assert (s.lr_frozen, s.lr_finetune, s.weight_decay, s.batch_size) == (1e-3, 1e-5, 1e-3, 32)
    assert (s.finetune_after, s.stop_after, s.max_epochs, s.min_decrease) == (5, 10, None, 0)
    assert (s.dropout, s.context, s.select, s.open, s.precision) == (
        0.5, 9, "last", "bottom", "fp32"
    )  # fmt: skip
    assert (s.condense, s.text_mask, s.cma_residual, s.reset_patience, s.head_lr, s.trim) == (
        "sum", "union", False, False, None, "leading"
    )  # fmt: skip
    assert (s.head, s.dropout_at) == ("mlp", "modules")


def test_every_epoch_sees_each_training_utterance_once_in_another_order(go, monkeypatch):
    orders, batch = [], data.batch

    def watch(rows, *rest):
        if torch.is_grad_enabled():  # not while predicting
            orders.append(rows.tolist())
        return batch(rows, *rest)

    monkeypatch.setattr(data, "batch", watch)
    go("orders", "--fusion", "text-fc", "--frozen", "--seed", "7")
    first, second = (sum(orders[i : i + 2], []) for i in (0, 2))  # 39 utterances: 32 and 7
    assert len(orders[0]) == 32 and sorted(first) == sorted(second) and first != second
    assert len(set(first)) == len(first)


def test_a_damaged_checkpoint_is_one_sentence(go):
    folder = go("damaged", "--fusion", "text-fc", "--frozen")
    (folder / "result.json").unlink()
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(evaluate.RunError, match="checkpoint.pt: .*delete it"):
        go("damaged", "--fusion", "text-fc", "--frozen")


def test_other_settings_on_the_same_folder_are_refused_by_name(go, upstreams, tmp_path):
    folder = go("settings", "--fusion", "text-fc", "--frozen")
    other = tmp_path / "text"  # another BERT whose folder has the same name
    shutil.copytree(upstreams["text"], other)
    bert = Upstream(str(other), "text").model
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight += 0.1
    bert.save_pretrained(other)
    with pytest.raises(train.RunError, match="config.json: holds a run with .*delete .*settings"):
        go("settings", "--fusion", "text-fc", "--frozen", "--bert", str(other))
    assert (folder / "result.json").exists()


@pytest.mark.parametrize(
    "switch",
    [
        "--condense concat",
        "--text-mask target",
        "--cma-residual",
        "--reset-patience",
        "--context 1",
        "--head linear",
        "--dropout-at projector",
        "--dropout-at both",
        "--head-lr 1e-3",
        "--open nothing",
        "--open all",
        "--min-decrease 0.5",
        "--select best",
    ],
)
def test_every_switch_of_the_register_runs_and_changes_the_run(go, switch):
    plain = timeless(go("plain", "--fusion", "cmt-a2t"))
    other = timeless(go("switch" + switch.replace(" ", ""), "--fusion", "cmt-a2t", *switch.split()))
    assert (other[0], other[2]) != (plain[0], plain[2])


@pytest.mark.parametrize("arguments, message", [
    ("--system 19", "invalid choice: 19"), ("--fold x", "--fold"), ("--context 4", "odd"),
    ("--partial", "--iemocap"), ("--system 1 --frozen", "--frozen"), ("--dropout 1.5", "--dropout 1.5"), ("--batch-size 0", "from 1"),
])  # fmt: skip
def test_bad_flags_are_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.parse(arguments.split())
    assert message in capsys.readouterr().err


def test_a_corpus_that_is_not_the_full_release_is_refused_without_partial(small_corpus, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--iemocap", small_corpus, "--upstream", "tiny"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "dialogues 1 (not 28)" in done.stderr and "add --partial" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_step_at_full_size(fusion, full_size_upstreams):
    """WavLM-Large and BERT-base shapes with random weights: a step of each phase on the CPU."""
    g = torch.Generator().manual_seed(0)
    raw = {
        "audio": [0.1 * torch.randn(n, generator=g) for n in (80000, 30000)],
        "text": ["i hate it", "so do i , and all alone", "lovely party"],
    }
    windows = torch.tensor([[-1, -1, -1, -1, 0, 1, 2, -1, -1], [-1, -1, -1, 0, 1, 2, -1, -1, -1]])
    labels, rows = torch.tensor([2, 1]), torch.tensor([0, 1])
    config = Config(fusion)
    upstreams = {m: full_size_upstreams[m] for m in config.modalities}
    frozen = {}
    for m, upstream in upstreams.items():
        upstream.close()
        with torch.no_grad():
            x, mask = upstream(raw[m])
        assert x.shape[2:] == ((25, 1024) if m == "audio" else (13, 768))
        assert m == "text" or mask.sum(1).tolist() == [249, 93]
        frozen[m] = lambda rows, x=x, mask=mask: (x[rows].half(), mask[rows])
    head = EmotionRecognizer(config).train()

    def step(sources, parameters):
        def everything():
            found = dict(head.named_parameters())
            for m, upstream in upstreams.items():
                found |= {f"{m}.{n}": p for n, p in upstream.model.named_parameters()}
            return found

        before = {n: p.clone() for n, p in everything().items()}
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3)
        logits = head(**data.batch(rows, windows, sources, "cpu"))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        return {n for n, p in everything().items() if not torch.equal(before[n], p)}

    assert step(frozen, head.parameters()) == set(head.state_dict())
    opened = [p for upstream in upstreams.values() for p in upstream.open("bottom")]
    live = {m: data.live(upstream, raw[m]) for m, upstream in upstreams.items()}
    bottom = step(live, [*head.parameters(), *opened]) - set(head.state_dict())
    parts = {"audio": "audio.feature_extractor.", "text": "text.embeddings."}
    assert {n.split(".", 2)[0] for n in bottom} == set(upstreams)
    assert all(n.startswith(parts[n.split(".")[0]]) for n in bottom)


@pytest.fixture(scope="session")
def full_size_upstreams(tmp_path_factory):
    import transformers as hf

    import model

    folder = tmp_path_factory.mktemp("full")
    words = [f"word{i}" for i in range(20000)]  # a tokenizer that fits BERT's embedding
    tiny = model.make_tiny_upstreams(str(folder / "tiny"), [" ".join(words)])
    torch.manual_seed(0)
    for m, config, cls in (
        ("audio", model.wavlm_config(), hf.WavLMModel), ("text", hf.BertConfig(), hf.BertModel)
    ):  # fmt: skip
        cls(config).save_pretrained(folder / m)
        loader = hf.AutoFeatureExtractor if m == "audio" else hf.AutoTokenizer
        loader.from_pretrained(tiny[m]).save_pretrained(folder / m)
    return {m: Upstream(str(folder / m), m) for m in ("audio", "text")}


# --- what a finished run can do: an utterance of your own, pictures


def test_an_utterance_of_the_corpus_is_recognized_as_in_the_run(go, small_corpus, tmp_path):
    """The same probabilities as predictions.csv, by files and words alone."""
    corpus = data.read_iemocap(small_corpus)
    for fusion, switch in (("mmt", ()), ("mmt", ("--frozen",)), ("audio-fc", ()), ("text-fc", ())):
        folder = go(f"own-{fusion}{len(switch)}", "--fusion", fusion, *switch)
        recognizer = evaluate.Recognizer(folder)
        with open(folder / "predictions.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in (rows[0], rows[4], rows[-1]):  # at both edges of the dialogue, and within it
            i = next(i for i, u in enumerate(corpus) if u.id == row["utterance"])
            texts = [u.text for u in corpus if u.dialog == corpus[i].dialog]
            k = texts.index(corpus[i].text)
            p = recognizer.recognize(corpus[i].wav, texts[k], texts[:k], texts[k + 1 :])
            for c, value in p.items():
                assert value == pytest.approx(float(row[c]), abs=2e-3 if switch else 2e-5), fusion
    recognizer.recognize("x.wav", "oh no 1", before=["a"] * 6)
    said = " ".join(recognizer.remarks)
    assert "no audio" in said and "4 turns of context are missing" in said and "toy" not in said
    with pytest.raises(evaluate.RunError, match="--text"):
        recognizer.recognize("x.wav")


def test_long_audio_is_said(go, tmp_path):
    recognizer = evaluate.Recognizer(go("own-mmt0", "--fusion", "mmt"))
    write_wav(tmp_path / "long.wav", [0.1, -0.1] * 48000)
    recognizer.recognize(tmp_path / "long.wav", "oh no")
    assert "Of 6.0 s of audio, 5 s are used." in recognizer.remarks


def test_a_run_that_cannot_be_loaded_is_one_sentence(go):
    folder = go("broken", "--fusion", "text-fc")
    path = folder / "config.json"
    for old, new, message in (
        ('"text_dim": 64', '"text_dim": 32', "does not fit"),
        ('"fingerprint": "', '"fingerprint": "0', "not the weights"),
        ('"dim": 16', '"dummy": 16', "does not fit"),
        ('"name": "/', '"name": "/nowhere/', "/nowhere/"),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises((evaluate.RunError, train.UpstreamError), match=message):
            evaluate.Recognizer(folder)
        path.write_text(text)


def test_pictures_of_an_utterance_hold_what_they_show(go, small_corpus, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder = go("own-mmt0", "--fusion", "mmt")
    figures = []
    draw = evaluate.figure
    monkeypatch.setattr(evaluate, "figure", lambda *a: figures.append(draw(*a)) or figures[-1])
    wav = sorted(small_corpus.rglob("Ses05*.wav"))[0]
    evaluate.main([
        str(folder), "--wav", str(wav), "--text", "oh lovely party", "--before", "hate it",
        "--pictures", str(tmp_path),
    ])  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {"gates.png", "attention.png"}
    gates, attention = figures
    (ax,) = gates.axes  # three layers, gates of a sigmoid, audio and text
    assert len(ax.lines) == 2
    for line in ax.lines:
        assert len(line.get_ydata()) == 3 and all(0 < y < 1 for y in line.get_ydata())
    a2t, t2a = attention.axes[:2]
    assert "audio to text" in a2t.get_title() and "text to audio" in t2a.get_title()
    frames = (len(data.clip(data.load_wav(wav))) - 340) // 320 + 1  # of the tiny CNN
    rows, columns = (ax.images[0].get_array() for ax in (a2t, t2a))
    assert rows.shape == columns.shape == (5, frames)  # [CLS] oh lovely party [SEP]
    assert abs(rows.sum(axis=1) - 1).max() < 1e-5 and abs(columns.sum(axis=0) - 1).max() < 1e-5
    words = [t.get_text() for t in a2t.get_yticklabels()]
    assert words == ["[CLS]", "oh", "lovely", "party", "[SEP]"]
    assert all("small-partial" in fig.get_suptitle().replace("\n", " ") for fig in figures)
