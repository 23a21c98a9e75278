"""The beam search with a language model: the best text by brute force, words at the ends, what is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from d2v.cli.main import main
from d2v.evaluate.ctc import beam_search
from d2v.evaluate.language_model import LanguageModel
from tests.d2v.test_finetune_data import shares_of_texts

LETTERS = ("<s>", "|", "a", "b")
ARPA = """
\\data\\
ngram 1=6
ngram 2=4

\\1-grams:
-1.2\t<unk>\t0
0\t<s>\t-0.3
-0.9\t</s>\t0
-0.6\ta\t-0.2
-1.1\tb\t-0.4
-1.4\tab\t-0.1

\\2-grams:
-0.2\t<s> ab
-0.3\tab b
-0.7\ta b
-0.4\tb </s>

\\end\\
"""
"""log10 probabilities, and the back-off weights of contexts"""


class Bigrams:
    """What kenlm's Model does, for bigrams."""

    def __init__(self, path: str) -> None:
        self.probability: dict[tuple[str, ...], float] = {}
        self.backoff: dict[str, float] = {}
        for line in Path(path).read_text().splitlines():
            fields = line.split()
            if not fields or not fields[0].lstrip("-").replace(".", "").isdigit():
                continue
            words = tuple(word for word in fields[1:] if not word.lstrip("-").replace(".", "").isdigit())
            self.probability[words] = float(fields[0])
            if len(fields) > 1 + len(words):
                self.backoff[words[0]] = float(fields[-1])
        if not self.probability:
            raise OSError("no ARPA file")

    def __contains__(self, word: str) -> bool:
        return (word,) in self.probability

    def BeginSentenceWrite(self, state: Any) -> None:  # noqa: N802
        state.word = "<s>"

    def BaseScore(self, before: Any, word: str, after: Any) -> float:  # noqa: N802
        after.word = known = word if word in self else "<unk>"
        pair = self.probability.get((before.word, known))
        if pair is not None:
            return pair
        return self.backoff.get(before.word, 0.0) + self.probability[known,]


class State:
    word = ""


@pytest.fixture(params=["stand-in", "kenlm"])
def arpa(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ARPA file, read by kenlm or by what stands in for it where it is not installed."""
    if request.param == "kenlm":
        pytest.importorskip("kenlm", reason="kenlm is not installed")
    else:
        module = ModuleType("kenlm")
        module.Model, module.State = Bigrams, State  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "kenlm", module)
    file = tmp_path / "words.arpa"
    file.write_text(ARPA.lstrip("\n"))
    return file


def log10_of(words: list[str]) -> float:
    """Of a sentence, by the numbers above."""
    pairs = {("<s>", "ab"): -0.2, ("ab", "b"): -0.3, ("a", "b"): -0.7, ("b", "</s>"): -0.4}
    single = {"<unk>": -1.2, "</s>": -0.9, "a": -0.6, "b": -1.1, "ab": -1.4}
    backoff = {"<s>": -0.3, "a": -0.2, "b": -0.4, "ab": -0.1, "<unk>": 0.0}
    total, before = 0.0, "<s>"
    for word in [*words, "</s>"]:
        word = word if word in single else "<unk>"
        total += pairs.get((before, word), backoff[before] + single[word])
        before = word
    return total


@pytest.mark.parametrize(("weight", "bonus"), [(0.0, 0.0), (1.5, 0.5), (2.0, -1.0)])
def test_the_best_text_is_found(arpa: Path, weight: float, bonus: float) -> None:
    words = LanguageModel(arpa, LETTERS, weight, bonus)
    torch.manual_seed(0)
    changed = 0
    for _ in range(12):
        logits = 2 * torch.randn(1, 5, 4)
        texts = shares_of_texts(logits)

        def score(text: tuple[int, ...], shares: Counter[tuple[int, ...]] = texts) -> float:
            said = "".join(LETTERS[i] for i in text).replace("|", " ").split()
            return math.log(shares[text]) + weight * log10_of(said) + bonus * len(said)

        (found,) = beam_search(logits, None, 10_000, words)
        assert score(tuple(found)) == pytest.approx(max(map(score, texts)), rel=1e-6)
        changed += found != beam_search(logits, None, 10_000)[0]
    assert (changed > 0) == (weight > 0)


def test_utterances_do_not_see_each_other(arpa: Path) -> None:
    words = LanguageModel(arpa, LETTERS)
    torch.manual_seed(1)
    logits = torch.randn(2, 6, 4)
    padded = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    both = beam_search(logits, padded, 20, words)
    assert both == [
        beam_search(logits[:1], None, 20, words)[0],
        beam_search(logits[1:, :4], None, 20, words)[0],
    ]


@pytest.mark.parametrize(("known", "spelled"), [("the", "THE"), ("THE", "the"), ("the", "the")])
def test_words_are_looked_up_in_the_case_of_the_model(arpa: Path, known: str, spelled: str) -> None:
    arpa.write_text(re.sub(r"\bab\b", known, arpa.read_text()))
    words = LanguageModel(arpa, ("<s>", "|", *spelled), 1.0, 0.0)
    words.begin()
    assert words.score((2, 3, 4, 1)) == pytest.approx(-0.2)
    assert words.score((2, 3, 4)) == 0.0
    assert words.score((2, 3, 4), ended=True) == pytest.approx(-0.2 - 0.1 - 0.9)


def test_the_weight_is_on_log10_as_in_fairseq(arpa: Path) -> None:
    """fairseq's decoder adds lm_weight times what kenlm's BaseScore returns."""
    words = LanguageModel(arpa, LETTERS, weight=2.0, bonus=0.0)
    words.begin()
    assert words.score((2, 3, 1)) == pytest.approx(2 * -0.2)
    assert words.score((2, 3), ended=True) == pytest.approx(2 * (-0.2 - 0.1 - 0.9))


@pytest.mark.parametrize(
    ("letters", "said", "message"),
    [
        ("AB", (), "knows words in lower case alone, as 'a', and is looked up with 'A'"),
        ("AB", ("AB", "B"), "knows words in lower case alone, as 'ab', and is looked up with 'AB'"),
        ("abc", ("c", "ca"), "knows none of the 2 words that are said, such as 'c'"),
        ("ab", ("c", "b"), None),
        ("cd", (), None),  # letters that are no words say nothing
    ],
)
def test_models_of_other_words_are_refused(
    arpa: Path, letters: str, said: tuple[str, ...], message: str | None
) -> None:
    if message is None:
        LanguageModel(arpa, ("<s>", "|", *letters), words=said)
        return
    with pytest.raises(ValueError, match=message) as error:
        LanguageModel(arpa, ("<s>", "|", *letters), words=said)
    assert str(arpa) in str(error.value) and "\n" not in str(error.value)


def test_what_is_refused(
    arpa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        LanguageModel(tmp_path / "absent.arpa", LETTERS)
    with pytest.raises(ValueError, match="between words"):
        LanguageModel(arpa, ("<s>", "a"))
    arpa.write_text("nothing\n")
    with pytest.raises(ValueError, match="eval: --lm"):
        LanguageModel(arpa, LETTERS)
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(ValueError, match="pip install kenlm"):
        LanguageModel(arpa, LETTERS)
    assert main(["eval", str(tmp_path), "--lm", str(arpa)]) == 2
    assert "--lm needs a beam search" in capfd.readouterr().err


def test_eval_takes_a_model(arpa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from d2v.train.pretrain import run
    from tests.d2v.tiny_runs import make_data, tiny

    run(tiny("audio", steps=1), make_data("audio", tmp_path / "data"), tmp_path / "run")
    said = tmp_path / "said"
    for name in ("train", "test"):
        make_data("audio", said / name)
        for number, file in enumerate(sorted((said / name).glob("*.wav"))):
            file.with_suffix(".txt").write_text("ab b" if number % 2 else "a")
    tune = ["finetune", str(tmp_path / "run"), "--task", "ctc", "--data", str(said)]
    tune += ["--out", str(tmp_path / "t")]
    assert main([*tune, "--train.steps", "2", "--data.batch", "4"]) == 0
    assert "AB" not in json.loads((tmp_path / "t" / "labels.json").read_text())
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "t"), "--beam", "4", "--lm", str(arpa)]) == 2
    assert "knows words in lower case alone, as 'a', and is looked up with 'A'" in capsys.readouterr().err
    arpa.write_text(re.sub(r"\b(a|b|ab)\b", lambda word: word[0].upper(), arpa.read_text()))
    scores = []
    for options in ([], ["--lm", str(arpa), "--lm-weight", "5", "--word-bonus", "9"]):
        assert main(["eval", str(tmp_path / "t"), "--beam", "4", *options]) == 0
        scores.append(capsys.readouterr().out)
    assert scores[0] != scores[1] and "test/wer" in scores[1]
    arpa.write_text(re.sub(r"\b(A|B|AB)\b", r"OTHER\1", arpa.read_text()))
    assert main(["eval", str(tmp_path / "t"), "--beam", "4", "--lm", str(arpa)]) == 2
    assert "knows none of the 3 words that are said, such as 'A'" in capsys.readouterr().err
