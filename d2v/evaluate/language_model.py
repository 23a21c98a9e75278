"""An n-gram language model of words for the beam search, through kenlm (`pip install kenlm`).

A text's score is ln P(letters) + weight log10 P(words) + bonus (words): kenlm's base-10 logarithm is taken as
it comes, as fairseq's decoder takes it, for which published weights are meant
(examples/speech_recognition/new/decoders/flashlight_decoder.py; flashlight's KenLM::score). A word counts
when it is complete: at the bar behind it, or at the end of the utterance, which is a sentence of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ..data.speech.letters import WORD

WEIGHT, BONUS = 2.0, -1.0
"""fairseq's defaults"""


class LanguageModel:
    """path: an ARPA file or kenlm's binary. letters: of the vocabulary that a search uses, by id. weight: on
    log10 probabilities. words: some that are said, as the vocabulary spells them.

    Words are looked up in the case in which the model knows "the", if it is one alone. Raises ValueError
    where kenlm is missing, the file is none of its models, the vocabulary has no bar, or the model knows none
    of the words, or them in another case alone.
    """

    def __init__(
        self,
        path: str | Path,
        letters: Sequence[str],
        weight: float = WEIGHT,
        bonus: float = BONUS,
        words: Collection[str] = (),
    ) -> None:
        try:
            import kenlm
        except ModuleNotFoundError:
            raise ValueError("eval: --lm needs the package kenlm: pip install kenlm") from None
        if not Path(path).is_file():
            raise ValueError(f"eval: --lm {path} does not exist")
        if WORD not in letters:
            raise ValueError(f"eval: --lm needs a vocabulary with {WORD!r} between words")
        try:
            self._model: Any = kenlm.Model(str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"eval: --lm {path}: {error}") from None
        self._new_state = kenlm.State
        self.letters, self.weight, self.bonus = tuple(letters), weight, bonus
        self.bar = self.letters.index(WORD)
        lower, upper = "the" in self._model, "THE" in self._model
        self._case: Callable[[str], str] = str if lower == upper else str.lower if lower else str.upper
        self._check_words(path, words)
        self._known: dict[tuple[int, ...], tuple[float, Any]] = {}

    def _check_words(self, path: str | Path, words: Collection[str]) -> None:
        """Refuse a model to which all words are unknown; letters that are words tell its case, too."""
        words = set(words)
        tried = words or {letter for letter in self.letters if letter.isalpha()}
        if any(self._case(word) in self._model for word in tried):
            return
        for name, case in (("lower", str.lower), ("upper", str.upper)):
            if found := sorted(word for word in tried if case(word) in self._model):
                raise ValueError(
                    f"eval: --lm {path} knows words in {name} case alone, as {case(found[0])!r}, and is "
                    f"looked up with {self._case(found[0])!r}: build it from text in the vocabulary's case"
                )
        if words:
            raise ValueError(f"eval: --lm {path} knows none of the {len(words)} words that are said, such as "
                             f"{min(words)!r}")  # fmt: skip

    def begin(self) -> None:
        """Forget the prefixes of the last utterance."""
        start = self._new_state()
        self._model.BeginSentenceWrite(start)
        self._known = {(): (0.0, start)}

    def score(self, prefix: tuple[int, ...], *, ended: bool = False) -> float:
        """What is added to the log probability of a prefix of letters, for its complete words.

        ended: nothing follows, so a last word without a bar is complete too, and so is the sentence.
        """
        total, state = self._complete(prefix)
        if not ended:
            return total
        if word := self._last_word(prefix):
            added, state = self._add(state, word)
            total += added
        return total + self.weight * self._model.BaseScore(state, "</s>", self._new_state())

    def _complete(self, prefix: tuple[int, ...]) -> tuple[float, Any]:
        """Score and state after the complete words; a prefix is known once what it grew from is."""
        found = self._known.get(prefix)
        if found is None:
            total, state = self._complete(prefix[:-1])
            if prefix[-1] == self.bar and (word := self._last_word(prefix[:-1])):
                added, state = self._add(state, word)
                total += added
            found = self._known[prefix] = total, state
        return found

    def _last_word(self, prefix: tuple[int, ...]) -> str:
        """The letters behind the last bar."""
        start = len(prefix)
        while start and prefix[start - 1] != self.bar:
            start -= 1
        return "".join(self.letters[i] for i in prefix[start:])

    def _add(self, state: Any, word: str) -> tuple[float, Any]:
        following = self._new_state()
        score = self._model.BaseScore(state, self._case(word), following)
        return self.weight * score + self.bonus, following
