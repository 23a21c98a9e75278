"""An n-gram language model of words for the beam search, through kenlm (`pip install kenlm`).

A text's score is log P(letters) + weight log P(words) + bonus (words), natural logarithms, as in fairseq's
wav2vec 2.0 evaluation (whose defaults are weight 2 and bonus -1). A word counts when it is complete: at the
bar behind it, or at the end of the utterance, which is a sentence of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.speech.letters import WORD

LN10 = math.log(10.0)


class LanguageModel:
    """path: an ARPA file or kenlm's binary. letters: of the vocabulary that a search uses, by id.

    Words are looked up in the case in which the model knows "the", if it is one alone. Raises ValueError
    where kenlm is missing, the file is none of its models, or the vocabulary has no bar.
    """

    def __init__(
        self, path: str | Path, letters: Sequence[str], weight: float = 2.0, bonus: float = -1.0
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
        self._known: dict[tuple[int, ...], tuple[float, Any]] = {}

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
        return total + self.weight * LN10 * self._model.BaseScore(state, "</s>", self._new_state())

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
        return self.weight * LN10 * score + self.bonus, following
