"""Byte-level BPE: trained on the data, or read from a tokenizers .json or from GPT-2's files.

Whatever the source, the result is one `tokenizers.Tokenizer` whose ids are fairseq's: <s> 0, <pad> 1,
</s> 2, <unk> 3, then the vocabulary; it is kept as `tokenizer.json` in the run directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ...config.fronts import TextFront
from ..lines import lines_of
from ..types import DataError
from .records import PIECE, cut

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""ids 0 to 3, as in fairseq/data/dictionary.py"""
BOS, PAD, EOS = range(3)
SMALLEST_BLOCK = 4
"""tokens: <s> a </s> </s> b </s> has as many beside its texts"""
TOGETHER = 1 << 23
"""characters handed to the tokenizer at a time: it works on them in parallel, in up to 100 bytes for each"""
DOCUMENT = 64
"""characters that a document counts as beside its own, so that short ones do not pile up"""
SMALLEST = len(SPECIALS) + 256
"""a byte-level vocabulary holds every byte"""


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, specials included."""
    if vocab_size < SMALLEST:
        raise ValueError(f"data: front.vocab_size must be at least {SMALLEST} to train a byte-level "
                         f"tokenizer, got {vocab_size}")  # fmt: skip
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _from_gpt2(folder: Path) -> Tokenizer:
    """vocab.json and merges.txt. With fairseq's dict.txt beside them ids follow its order (line n is id
    n + 4), as in the original's checkpoints; without it GPT-2's ids move up by 4."""
    try:
        ids: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = lines_of((folder / "merges.txt").read_bytes())
        pairs = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
        if (folder / "dict.txt").is_file():
            entries = lines_of((folder / "dict.txt").read_bytes())
            order = {line.rsplit(" ", 1)[0]: n for n, line in enumerate(entries, start=len(SPECIALS))}
            absent = [token for token, number in ids.items() if str(number) not in order]
            if absent:
                raise DataError(
                    f"data: {folder / 'dict.txt'} lacks {absent[0]!r} ({ids[absent[0]]}) of vocab.json"
                )
            ids = {token: order[str(number)] for token, number in ids.items()}
        else:
            ids = {token: number + len(SPECIALS) for token, number in ids.items()}
        ids.update({name: number for number, name in enumerate(SPECIALS)})
        tokenizer = _byte_level(models.BPE(ids, [(left, right) for left, _, right in pairs]))
    except DataError:
        raise
    except Exception as error:  # tokenizers raises bare Exception on bad merges
        raise DataError(f"data: {folder}: not GPT-2's vocab.json and merges.txt: {error}") from None
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizers .json, whose own truncation and padding are left out, or a folder with GPT-2's files.

    Raises DataError.
    """
    if path.is_dir():
        return _from_gpt2(path)
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception on a bad file
        raise DataError(f"data: {path}: not a readable tokenizer: {error}") from None
    return uncut(tokenizer)


def uncut(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without truncation and padding, which `save_pretrained` of transformers writes into its
    file as the last call had them."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode_beginnings(texts: Sequence[str], tokenizer: Tokenizer, block: int) -> Iterator[list[int]]:
    """Token ids of each text, without specials; of a text of several pieces its first `block`, at least."""
    for some in _together(texts):
        pieces = [cut(text) for text in some]
        for encoding, following in zip(
            tokenizer.encode_batch(list(map(next, pieces)), add_special_tokens=False), pieces, strict=True
        ):
            ids = list(encoding.ids)
            while len(ids) < block and (piece := next(following, None)) is not None:
                ids += tokenizer.encode(piece, add_special_tokens=False).ids
            yield ids


def _together(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Texts of about `TOGETHER` characters at a time."""
    begin, characters = 0, 0
    for number, text in enumerate(texts, start=1):
        characters += min(len(text), 2 * PIECE) + DOCUMENT
        if characters > TOGETHER or number == len(texts):
            yield texts[begin:number]
            begin, characters = number, 0


def check_block(block: int, front: TextFront) -> None:
    """ValueError for a data.block that the model cannot hold, or that the tokens around texts fill."""
    if not SMALLEST_BLOCK <= block <= front.max_positions:
        raise ValueError(f"data: data.block must be in {SMALLEST_BLOCK}..{front.max_positions} "
                         f"(front.max_positions), got {block}")  # fmt: skip


def check_vocabulary(tokenizer: Tokenizer, where: str, front: TextFront) -> None:
    """Refuse a tokenizer with ids that the model lacks; text that looks like "<s>" stays text."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if largest > front.vocab_size:
        raise DataError(
            f"data: tokenizer {where} has {largest} tokens, front.vocab_size is {front.vocab_size}"
        )
    tokenizer.encode_special_tokens = True


def check_tokenizer(tokenizer: Tokenizer, where: str, front: TextFront) -> Tokenizer:
    """Refuse a tokenizer whose ids do not fit one of our models; else as `check_vocabulary`."""
    check_vocabulary(tokenizer, where, front)
    for number, name in enumerate(SPECIALS):
        if tokenizer.token_to_id(name) != number:
            raise DataError(
                f"data: tokenizer {where} must have {name} as id {number}, has {tokenizer.token_to_id(name)}"
            )
    if front.pad_id != PAD:
        raise DataError(f"data: tokenizer {where} pads with id {PAD}, front.pad_id is {front.pad_id}")
    tokenizer.add_special_tokens(list(SPECIALS))  # where a file has them as ordinary added tokens
    return tokenizer
