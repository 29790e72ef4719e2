"""train.py: the triggers on written-out losses, and whole runs on a small corpus."""

import csv
import importlib
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

import data
import evaluate
import train
from conftest import ROOT, write_wav
from model import Config
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
    monkeypatch.setattr(train, "FINETUNE_AFTER", 2)
    monkeypatch.setattr(train, "STOP_AFTER", 4)

    def run(out, *arguments, root=small_corpus, device="cpu"):
        train.main([
            "--iemocap", str(root), "--partial", "--wavlm", upstreams["audio"], "--bert",
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
    result.pop("peak_memory_bytes")
    return log, result, (folder / "predictions.csv").read_text()


def test_a_run_from_end_to_end(go, small_corpus, capsys):
    folder = go("end-to-end", "--fusion", "mmt", "--fold", "5")
    assert folder.parts[-3:] == ("small-partial", "mmt-finetuned", "fold5-seed0")
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
    assert "on the CPU" in said and "Trigger" in said and "Stop" in said and "small-partial: WA" in said
    go("end-to-end", "--fusion", "mmt", "--fold", "5")
    assert "done before" in capsys.readouterr().out


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_to_the_same_bits(go, monkeypatch):
    whole = timeless(go("whole", "--fusion", "ef"))
    save, calls, fine, deaths = train.save, [], [], []

    def dying_save(path, state):
        save(path, state)
        calls.append(path.name)
        fine.append(state["finetune_epoch"] is not None)
        first_trigger = path.name == "trigger.pt" and calls.count("trigger.pt") == 1
        if len(calls) == 2 or first_trigger or fine[-1] and sum(fine) in (1, 2):  # in both phases
            deaths.append(path.name)
            raise Killed

    monkeypatch.setattr(train, "save", dying_save)
    for _ in range(5):
        try:
            folder = go("killed", "--fusion", "ef")
            break
        except Killed:
            pass
    assert deaths == ["checkpoint.pt", "trigger.pt", "checkpoint.pt", "checkpoint.pt"]
    assert timeless(folder) == whole


def test_twins_share_their_frozen_phase_and_end_as_they_would_alone(go, workplace, capsys):
    alone = timeless(go("a1", "--system", "14")), timeless(go("a2", "--system", "13"))
    go("b", "--system", "13", "14")
    assert "epochs to the trigger" in capsys.readouterr().out
    go("c", "--system", "14")
    go("c", "--system", "13")  # the other way round
    for out in ("b", "c"):
        found = workplace / out / "small-partial"
        assert timeless(found / "ef-finetuned" / "fold5-seed0") == alone[0]
        assert timeless(found / "ef-frozen" / "fold5-seed0") == alone[1]


def test_same_seed_same_bits_other_seed_other_result(go, workplace):
    first = timeless(go("s1", "--fusion", "text-fc", "--seed", "3"))
    assert timeless(go("s2", "--fusion", "text-fc", "--seed", "3")) == first
    assert timeless(go("s3", "--fusion", "text-fc", "--seed", "4"))[0] != first[0]


def test_only_what_the_paper_opens_is_ever_changed(go, monkeypatch):
    seen = {}
    step = torch.optim.AdamW.step

    def watch(optimizer, *args):
        rate = optimizer.param_groups[0]["lr"]
        seen.setdefault(rate, set()).update(map(id, optimizer.param_groups[0]["params"]))
        assert optimizer.param_groups[0]["weight_decay"] == 1e-3
        return step(optimizer, *args)

    prepare, materials = train.prepare, []
    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    monkeypatch.setattr(train, "prepare", lambda *a: materials.append(prepare(*a)) or materials[-1])
    load, before = train.Training, {}

    class Watched(load):
        def __init__(self, settings, material, device):
            super().__init__(settings, material, device)
            for m, upstream in material.upstreams.items():
                before[m] = {n: p.clone() for n, p in upstream.model.named_parameters()}

    monkeypatch.setattr(train, "Training", Watched)
    go("opened", "--fusion", "mmt")
    head, all_of_it = seen[1e-3], seen[1e-5]
    assert head < all_of_it
    opened = {id(p) for u in materials[0].upstreams.values() for p in u.finetunable().parameters()}
    assert all_of_it - head == opened
    for m, part in (("audio", "feature_extractor."), ("text", "embeddings.")):
        for name, p in materials[0].upstreams[m].model.named_parameters():
            same = torch.equal(p, before[m][name])
            # BERT's position and type rows beyond what was used move by weight decay alone: also opened.
            assert same != name.startswith(part), name


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


def test_selecting_on_test_shouts_and_is_marked(go, capsys):
    folder = go("cheat", "--fusion", "text-fc", "--select", "test")
    assert "SELECTING ON TEST" in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["select"] == "test"
    assert json.loads((go("best", "--fusion", "text-fc", "--select", "best") / "result.json").read_text())[
        "select"] == "best"  # fmt: skip


def test_best_takes_the_weights_of_the_lowest_development_loss(go):
    folder = go("best-ef", "--fusion", "ef", "--select", "best")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    lowest = min(state["log"], key=lambda row: row["dev_loss"])
    assert state["selected"]["value"] == -lowest["dev_loss"]
    assert (state["selected"]["finetune_epoch"] is None) == (lowest["phase"] == "frozen")


def test_best_predicts_with_the_weights_it_kept(go):
    folder = go("best-predicts", "--fusion", "text-fc", "--select", "best", "--frozen")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["log"][-1]["since_best"] > 0  # the last epoch is not the best
    last = go("last-predicts", "--fusion", "text-fc", "--frozen")
    assert (folder / "predictions.csv").read_text() != (last / "predictions.csv").read_text()
    # Give the last run the best weights for its last ones, and let it test again.
    other = torch.load(last / "checkpoint.pt", weights_only=True)
    other["weights"] = state["selected"]["weights"]
    torch.save(other, last / "checkpoint.pt")
    (last / "result.json").unlink()
    go("last-predicts", "--fusion", "text-fc", "--frozen")
    assert (folder / "predictions.csv").read_text() == (last / "predictions.csv").read_text()


def test_the_papers_numbers_are_the_defaults(capsys):
    args = train.parse([])
    assert (args.dropout, args.context, args.select, args.fold) == (0.5, 9, "last", ["5"])
    assert (train.LR_FROZEN, train.LR_FINETUNE, train.WEIGHT_DECAY) == (1e-3, 1e-5, 1e-3)
    assert (train.BATCH, train.FINETUNE_AFTER, train.STOP_AFTER) == (32, 5, 10)
    # Reports name what differs from these: they must hold the same.
    known = evaluate.SWITCHES
    assert (known["lr"], known["weight_decay"], known["batch"]) == ([1e-3, 1e-5], 1e-3, 32)
    assert known["triggers"] == [train.FINETUNE_AFTER, train.STOP_AFTER]


def test_a_changed_constant_is_another_run_and_changed_code_is_said(go, monkeypatch, capsys):
    command = ("--fusion", "text-fc", "--frozen")
    folder = go("constants", *command)
    (run,), _ = evaluate.find_runs(folder)
    assert run.title.startswith("small-partial, triggers [2, 4], wavlm ")
    monkeypatch.setattr(train, "STOP_AFTER", 3)
    with pytest.raises(train.RunError, match=r"with triggers \[2, 4\], not \[2, 3\]"):
        go("constants", *command)
    monkeypatch.setattr(train, "STOP_AFTER", 4)
    config = json.loads((folder / "config.json").read_text())
    config["code"]["model.py"] = "0"
    (folder / "config.json").write_text(json.dumps(config))
    go("constants", *command)
    assert "was begun before model.py changed" in capsys.readouterr().out
    # Unfinished, it goes on with the new code, and is marked for good.
    (folder / "result.json").unlink()
    for _ in range(2):
        go("constants", *command)
        (run,), _ = evaluate.find_runs(folder)
        assert run.title.endswith("code_changed ['model.py']")


def test_a_twin_of_other_code_is_no_twin(go, workplace, capsys):
    go("coded-twins", "--system", "13")
    config = workplace / "coded-twins" / "small-partial" / "ef-frozen" / "fold5-seed0" / "config.json"
    found = json.loads(config.read_text())
    found["code"]["model.py"] = "0"
    config.write_text(json.dumps(found))
    capsys.readouterr()
    go("coded-twins", "--system", "14")
    assert "epochs to the trigger" not in capsys.readouterr().out


def test_states_of_other_code_are_made_anew(go, monkeypatch, capsys):
    go("code", "--fusion", "text-fc", "--frozen")
    go("code", "--fusion", "text-fc", "--frozen")
    assert "made with another" not in capsys.readouterr().out
    code = data.code
    monkeypatch.setattr(data, "code", lambda *things: code(*things) + "x")
    with pytest.raises(train.RunError, match="holds a run with upstreams"):
        go("code", "--fusion", "text-fc", "--frozen")
    assert "made with another code" in capsys.readouterr().out


def test_the_fingerprint_of_code_sees_what_it_does_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    prints = []
    for k, text in enumerate((
        'def f(x):\n    """Doc."""\n    return x + 1\n',
        'def f(x):\n    """Another."""\n\n    # why\n    return x + 1  # so\n',
        'def f(x):\n    """Doc."""\n    return x + 2\n',
    )):  # fmt: skip
        (tmp_path / f"coded{k}.py").write_text(text)
        module = importlib.import_module(f"coded{k}")
        prints.append((data.code(module), data.code(module.f)))
    assert prints[0] == prints[1]
    assert prints[0][0] != prints[2][0] and prints[0][1] != prints[2][1]


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
    with pytest.raises(evaluate.RunError, match="checkpoint.pt: cannot be read .*delete it"):
        go("damaged", "--fusion", "text-fc", "--frozen")


def test_other_settings_on_the_same_folder_are_refused_by_name(go):
    go("settings", "--fusion", "text-fc", "--frozen")
    with pytest.raises(train.RunError, match="with dropout 0.5, not 0.1"):
        go("settings", "--fusion", "text-fc", "--frozen", "--dropout", "0.1")


@pytest.mark.parametrize(
    "switch",
    [
        "--condense concat",
        "--text-mask target",
        "--cma-residual",
        "--reset-patience",
        "--context 1",
    ],
)
def test_every_switch_of_the_register_runs_and_changes_the_run(go, switch):
    plain = timeless(go("plain", "--fusion", "cmt-a2t"))
    other = timeless(go("switch" + switch.replace(" ", ""), "--fusion", "cmt-a2t", *switch.split()))
    assert other[0] != plain[0]


@pytest.mark.parametrize("arguments, message", [
    ("--system 19", "from 1 to 18"), ("--fold 6", "from 1 to 5"), ("--context 4", "odd"),
    ("--partial", "--iemocap"), ("--system 1 --frozen", "--frozen"), ("--dropout 1", "--dropout 1.0"),
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
    assert "dialogs missing" in done.stderr and "say --partial" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fusion", train.FUSIONS)
def test_one_step_at_full_size(fusion, full_size_upstreams):
    """WavLM-Large and BERT-base shapes with random weights: a step of each phase on the CPU."""
    upstreams = full_size_upstreams
    g = torch.Generator().manual_seed(0)
    clips = [0.1 * torch.randn(n, generator=g) for n in (80000, 30000)]
    texts = ["i hate it", "so do i , and all alone", "lovely party"]
    windows = torch.tensor([[-1, -1, -1, -1, 0, 1, 2, -1, -1], [-1, -1, -1, 0, 1, 2, -1, -1, -1]])
    labels = torch.tensor([2, 1])
    material = train.Material(
        "random", [], labels, {"audio": clips, "text": texts}, {}, upstreams,
        {m: {k: v.clone() for k, v in u.finetunable().state_dict().items()} for m, u in upstreams.items()}, {}, "",
    )  # fmt: skip
    for m in upstreams:
        with torch.no_grad():
            x, mask = upstreams[m](material.raw[m])
        assert x.shape[2:] == ((25, 1024) if m == "audio" else (13, 768))
        assert m == "text" or mask.sum(1).tolist() == [249, 93]
        material.states[m] = lambda rows, x=x, mask=mask: (x[rows].half(), mask[rows])
    settings = {"frozen": False, "seed": 0, "reset_patience": False, **asdict(Config(fusion))}
    data_windows, data.context_windows = data.context_windows, lambda corpus, size: windows
    try:
        run = train.Training(settings, material, "cpu")
    finally:
        data.context_windows = data_windows
    run.model.train()

    def step():
        before = {n: p.clone() for n, p in run.model.named_parameters()}
        for m, u in run.upstreams.items():
            before |= {f"{m}.{n}": p.clone() for n, p in u.model.named_parameters()}
        loss = torch.nn.functional.cross_entropy(
            run.model(**run.batch(torch.tensor([0, 1]))), labels
        )
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        after = dict(run.model.named_parameters())
        for m, u in run.upstreams.items():
            after |= {f"{m}.{n}": p for n, p in u.model.named_parameters()}
        return {n for n in before if not torch.equal(before[n], after[n])}, set(
            run.model.state_dict()
        )

    changed, head = step()
    assert changed == head
    run.start_finetuning()
    changed, head = step()
    bottom = {n for n in changed if n not in head}
    parts = {"audio": "audio.feature_extractor.", "text": "text.embeddings."}
    assert {n.split(".", 2)[0] for n in bottom} == set(run.upstreams)
    assert all(n.startswith(parts[n.split(".")[0]]) for n in bottom)


@pytest.fixture(scope="session")
def full_size_upstreams(tmp_path_factory):
    import transformers as hf

    import model

    folder = tmp_path_factory.mktemp("full")
    tiny = model.make_tiny_upstreams(
        str(folder / "tiny"), ["i hate it so do all alone lovely party and ,"]
    )
    torch.manual_seed(0)
    for m, config, cls in (
        ("audio", model.wavlm_config(), hf.WavLMModel), ("text", hf.BertConfig(), hf.BertModel)
    ):  # fmt: skip
        cls(config).save_pretrained(folder / m)
        loader = hf.AutoFeatureExtractor if m == "audio" else hf.AutoTokenizer
        loader.from_pretrained(tiny[m]).save_pretrained(folder / m)
    return {m: model.Upstream(str(folder / m), m) for m in ("audio", "text")}


# --- what a finished run can do: an utterance of your own, pictures


def test_an_utterance_of_the_corpus_is_recognized_as_in_the_run(go, small_corpus):
    """The same probabilities as predictions.csv, by files and words alone."""
    corpus = data.read_iemocap(small_corpus)
    for fusion, switch in (("mmt", ()), ("mmt", ("--frozen",)), ("audio-fc", ()), ("text-fc", ())):
        folder = go("own", "--fusion", fusion, *switch)
        folder = folder.parents[1] / f"{fusion}-{'frozen' if switch else 'finetuned'}" / folder.name
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
    said = recognizer.explain("x.wav", "oh no 1", before=["a"] * 6)
    assert "only reads" in said and "--before the model reads the 4 nearest" in said
    assert "--after has 0 of the 4" in said and "it was right on" in said and "toy" not in said
    with pytest.raises(evaluate.RunError, match="--text"):
        recognizer.recognize("x.wav")


def test_long_audio_and_a_toy_model_are_said(go, tmp_path, monkeypatch):
    folder = go("own-mmt", "--fusion", "mmt")
    write_wav(tmp_path / "long.wav", [0.1, -0.1] * 48000)
    monkeypatch.setattr(evaluate, "read_run", lambda f, read=evaluate.read_run: toy(read(f)))

    def toy(run):
        run.result["corpus"] = "toy"
        return run

    said = evaluate.Recognizer(folder).explain(tmp_path / "long.wav", "oh no")
    assert "6.0 s long; the model hears 5.0 s" in said and "means nothing" in said
    assert all(line.startswith("toy: ") for line in said.splitlines())


def test_a_run_that_cannot_be_loaded_is_one_sentence(go, tmp_path):
    folder = go("broken", "--fusion", "text-fc")
    path = folder / "config.json"
    for old, new, message in (
        ('"text_dim": 64', '"text_dim": 32', "does not fit"), ('"weights": "', '"weights": "0', "not the weights"),
        ('"dim": 16', '"dummy": 16', "does not fit"), ('"text": "/', '"text": "/nowhere/', "/nowhere/"),
    ):  # fmt: skip
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises((evaluate.RunError, train.UpstreamError), match=message):
            evaluate.Recognizer(folder)
        path.write_text(text)


def test_pictures_of_an_utterance_hold_what_they_show(go, small_corpus, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder = go("own-mmt", "--fusion", "mmt")
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
    for ax in gates.axes:  # three layers, gates of a sigmoid
        for line in ax.lines:
            assert len(line.get_ydata()) == 3 and all(0 < y < 1 for y in line.get_ydata())
    assert [len(ax.lines) for ax in gates.axes] == [1, 2]  # of BERT: the target and one turn before
    a2t, t2a, wave = attention.axes[:3]
    assert "A→T" in a2t.get_title() and "T→A" in t2a.get_title()
    frames = (len(data.clip(data.load_wav(wav))) - 400) // 320 + 1
    rows, columns = (ax.images[0].get_array() for ax in (a2t, t2a))
    assert rows.shape == columns.shape == (5, frames)  # [CLS] oh lovely party [SEP]
    assert abs(rows.sum(axis=1) - 1).max() < 1e-5 and abs(columns.sum(axis=0) - 1).max() < 1e-5
    words = [t.get_text() for t in a2t.get_yticklabels()]
    assert words == ["[CLS]", "oh", "lovely", "party", "[SEP]"]
    assert all(fig.get_suptitle().startswith("small-partial") for fig in figures)
