"""The model card of a folder for transformers: what it is, how to open it, what it reads.

No path stands in it, and no name of a data set.
"""

from __future__ import annotations

from collections.abc import Sequence

from d2vkern import __version__

from ..config.fronts import ImageFront, LogMelFront, TextFront, WaveformFront
from ..config.model import ModelConfig
from ..config.run import WaveNorm
from ..config.tune import HeadConfig
from ..data.normalisation import Normalisation

PAPERS = {
    "data2vec2": ("data2vec 2.0", "Baevski et al., 2022, arXiv:2212.07525"),
    "data2vec1": ("data2vec", "Baevski et al., 2022, arXiv:2202.03555"),
    "mae": ("MAE", "He et al., 2021, arXiv:2111.06377"),
    "mlm": ("BERT's masked language modelling", "Devlin et al., 2018, arXiv:1810.04805"),
}
"""objective -> what it is called, and its paper"""
TASKS = {
    "ImageClassification": ("image-classification", "classes of pictures"),
    "AudioClassification": ("audio-classification", "classes of sounds"),
    "CTC": ("automatic-speech-recognition", "letters of speech"),
    "SequenceClassification": ("text-classification", "labels of sentences, or of pairs of them"),
}
"""head -> transformers' name of the task, and what its outputs are"""
INPUTS = {
    "image": ("AutoImageProcessor", "Image.open(file)", "pictures"),
    "audio": ("AutoFeatureExtractor", "wave, sampling_rate={rate}, padding=True", "speech"),
    "text": ("AutoTokenizer", "text", "text"),
}
"""modality -> what prepares its inputs, the call, and what it is called"""
SHOWN = 20
"""classes that are named"""
CARD = """\
---
library_name: transformers
pipeline_tag: {tag}
tags:
- data2vec2
- {modality}
---

# {title}

This is {what}: {size}. Its code lies beside it; PyTorch and transformers run it.

```python
{code}
```

## Inputs and outputs

{facts}

## Not recorded here

Which data it was trained on, how good it is, and under which licence it may be used.

Written by d2v {version}.
"""


def card(
    cfg: ModelConfig,
    *,
    parameters: int,
    weights: str,
    head: tuple[str, HeadConfig] | None,
    names: Sequence[str],
    normalisation: Normalisation | None,
    waves: WaveNorm,
    prepared: bool,
) -> str:
    """README.md of the folder.

    parameters: of what transformers opens. weights: whose they are, of what was pretrained. head: what is
    called after AutoModelFor, and its config. names: of classes, or letters. prepared: whether the folder has
    what prepares inputs.
    """
    method, paper = PAPERS[cfg.objective]
    reader, call, inputs = INPUTS[cfg.modality]
    if isinstance(cfg.front, (WaveformFront, LogMelFront)):
        call = call.format(rate=cfg.front.sample_rate)
    if head is None:
        tag = "image-feature-extraction" if cfg.modality == "image" else "feature-extraction"
        opener, result = "AutoModel", "last_hidden_state"
        title = f"Encoder of {inputs}"
        what = f"the {weights}'s encoder of a pretraining with {method} ({paper})"
    else:
        tag, outputs = TASKS[head[0]]
        opener, result = f"AutoModelFor{head[0]}", "logits"
        number = "one number" if head[1].regression else f"{head[1].outputs} outputs"
        title, what = outputs.capitalize(), f"an encoder of {method} ({paper}) with a head of {number}"
        if head[0] == "CTC" and names:
            reader = "AutoProcessor"
    code = ["from PIL import Image"] if cfg.modality == "image" and prepared else []
    code += [f"from transformers import {opener}" + (f", {reader}" if prepared else ""), ""]
    code.append(f"model = {opener}.from_pretrained(FOLDER, trust_remote_code=True)")
    if prepared:
        code += [
            f"prepare = {reader}.from_pretrained(FOLDER, trust_remote_code=True)",
            f'result = model(**prepare({call}, return_tensors="pt")).{result}',
        ]
    if reader == "AutoProcessor":
        code.append("texts = prepare.batch_decode(result.argmax(-1))")
    facts = [_inputs(cfg, normalisation, waves)]
    if head is not None and head[0] == "CTC":
        facts.append(f"CTC's blank is number 0, `<pad>`. Letters: `{''.join(names[4:]) or 'not known'}`.")
    elif names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        facts.append(f"Classes: {', '.join(names[:SHOWN])}{more}.")
    blocks = cfg.prenet_depth + cfg.depth
    return CARD.format(
        tag=tag,
        modality=cfg.modality,
        title=title,
        what=what,
        size=f"{blocks} blocks, width {cfg.dim}, {cfg.heads} heads, {parameters:,} parameters in fp32",
        code="\n".join(code),
        facts=" ".join(facts),
        version=__version__,
    )


def _inputs(cfg: ModelConfig, normalisation: Normalisation | None, waves: WaveNorm) -> str:
    front = cfg.front
    if isinstance(front, ImageFront):
        return (
            f"Pictures of {front.height}x{front.width}x{front.channels} (height, width, channels): the "
            "shorter side resized to 256/224 of that, bicubic with antialiasing, and the centre cut out; "
            f"bytes as 0..1, then normalised ({normalisation})."
        )
    if isinstance(front, TextFront):
        return f"At most {front.max_positions} tokens: `<s> a </s>`, or `<s> a </s> </s> b </s>` for a pair."
    scaled = "as they are recorded" if waves == "none" else "each of zero mean and unit variance"
    return f"Waves at {front.sample_rate:,} Hz, {scaled}; a mask of padding."
