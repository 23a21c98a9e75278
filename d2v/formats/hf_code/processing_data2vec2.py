"""Speech for data2vec 2.0 encoders in Hugging Face transformers: waves and texts exactly as d2v reads them.

Classes are called as those of transformers where it asks for the name.
"""

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from ...data.speech.letters import spell, to_letters


class Wav2Vec2FeatureExtractor(transformers.Wav2Vec2FeatureExtractor):
    """Unit variance as in training, which adds 1e-5 to it where transformers adds 1e-7."""

    @staticmethod
    def zero_mean_unit_var_norm(input_values, attention_mask=None, padding_value=0.0):
        lengths = map(len, input_values) if attention_mask is None else np.asarray(attention_mask).sum(-1)
        normed = []
        for wave, length in zip(input_values, lengths, strict=True):
            real = torch.tensor(wave[:length], dtype=torch.float32)
            made = np.full(len(wave), padding_value, dtype=np.float32)
            made[:length] = F.layer_norm(real, real.shape).numpy()
            normed.append(made)
        return normed


class Wav2Vec2CTCTokenizer(transformers.Wav2Vec2CTCTokenizer):
    """Letters in the vocabulary's case, without other marks, a bar after every word; only letters come back.

    The padding token is CTC's blank. Decode labels, which are no frames, with group_tokens=False.
    """

    def tokenize(self, text, **kwargs):
        return to_letters(spell(text, self.encoder))

    def convert_tokens_to_string(self, tokens, **kwargs):
        silent = {self.bos_token, self.eos_token, self.unk_token}
        made = super().convert_tokens_to_string(
            [self.pad_token if token in silent else token for token in tokens], **kwargs
        )
        return {**made, "text": " ".join(made["text"].split())}

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs):
        """Blanks stay until repeats are merged."""
        return super()._decode(token_ids, skip_special_tokens=False, **kwargs)


class Data2Vec2Processor(transformers.Wav2Vec2Processor):
    """The two of them. Called with waves it gives input_values and attention_mask, with text labels."""

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, **kwargs)
        return cls(extractor, transformers.AutoTokenizer.from_pretrained(folder, **kwargs))
