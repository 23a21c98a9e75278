"""What a folder for transformers says of its waves, letters and tokens: feature extractor and tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from ..config.fronts import LogMelFront, TextFront, WaveformFront
from ..config.run import WaveNorm
from ..data.normalisation import PREPROCESSOR
from ..data.speech.letters import SPECIALS, WORD
from ..data.text.tokenizer import load_tokenizer
from .folder import TOKENIZER

SPEECH = ("processing_data2vec2.py", "../../data/speech/letters.py")
"""code of a folder, from hf_code/"""
_SPOKEN = "Wav2Vec2Processor"
_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
}
"""of every tokenizer: what looks like a special token inside a text stays text"""


def copy_code(files: Sequence[str], folder: Path) -> None:
    """Files from hf_code/ and from other packages of d2v, which are one package in the folder."""
    for file in files:
        source = Path(__file__).parent / "hf_code" / file
        text = source.read_text(encoding="utf-8")
        code = re.sub(r"^from \.\.\.(?:\w+\.)+(?=\w+ import)", "from .", text, flags=re.MULTILINE)
        (folder / source.name).write_text(code, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_speech(
    front: WaveformFront | LogMelFront, letters: Sequence[str] | None, folder: Path, waves: WaveNorm
) -> None:
    """The feature extractor, and with the letters of a CTC vocabulary its tokenizer and the two's processor.

    Who trusts the folder's code gets its classes; who does not, transformers' own, which scale quiet waves
    otherwise and leave spelling to the caller. waves: data.wave_norm. ValueError for letters that are no
    vocabulary of ours.
    """
    classes: dict[str, Any] = {}
    if waves != "transformers":
        extractor = "processing_data2vec2.Wav2Vec2FeatureExtractor"
        classes |= {"AutoFeatureExtractor": extractor, "AutoProcessor": extractor}
    values: dict[str, Any] = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "auto_map": classes,
        "feature_size": 1,
        "sampling_rate": front.sample_rate,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": waves != "none",
        "return_attention_mask": True,
    }
    if letters:
        classes["AutoProcessor"] = "processing_data2vec2.Data2Vec2Processor"
        values["processor_class"] = _SPOKEN
        write_json(folder / "vocab.json", ctc_vocabulary(letters))
        write_json(folder / "tokenizer_config.json", _ctc_tokenizer())
    copy_code(SPEECH, folder)
    write_json(folder / PREPROCESSOR, values)


def ctc_vocabulary(letters: Sequence[str]) -> dict[str, int]:
    """Letters and their numbers, the first two by the names of transformers: CTC's blank, number 0, is <pad>.

    fairseq calls it <s>; pyctcdecode, which Wav2Vec2ProcessorWithLM hands the vocabulary, takes <pad> for it.
    ValueError where the first four are not fairseq's.
    """
    if tuple(letters[: len(SPECIALS)]) != SPECIALS:
        raise ValueError(f"convert: a CTC vocabulary begins with {', '.join(SPECIALS)}, got {letters[:4]}")
    begin, pad, *rest = letters
    return {letter: number for number, letter in enumerate((pad, begin, *rest))}


def _ctc_tokenizer() -> dict[str, Any]:
    return {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "auto_map": {"AutoTokenizer": ["processing_data2vec2.Wav2Vec2CTCTokenizer", None]},
        "processor_class": _SPOKEN,
        "word_delimiter_token": WORD,
        "do_lower_case": False,
        **_TOKENS,
    }


def write_tokenizer(tokenizer: Path, folder: Path, front: TextFront) -> None:
    """The tokenizer, with <s> text </s> and <s> a </s> </s> b </s> put together as in training."""
    loaded = load_tokenizer(tokenizer)
    ids = {token: loaded.token_to_id(token) for token in ("<s>", "</s>")}
    if None not in ids.values():
        loaded.post_processor = TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=list(ids.items())
        )
    loaded.save(str(folder / TOKENIZER))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "model_max_length": front.max_positions,
            "model_input_names": ["input_ids", "attention_mask"],
            **_TOKENS,
        },
    )
