"""Configuration of data2vec 2.0 encoders (Baevski et al., 2022) for Hugging Face transformers."""

import math

from transformers import PretrainedConfig


class Data2Vec2Config(PretrainedConfig):
    """modality: "image", "audio" or "text"; the fields named after it are read for that one alone.

    log_mel: of speech that is read as spectra, without convolutions: mels, window, hop, stack, sample_rate.
    """

    model_type = "data2vec2"

    def __init__(
        self,
        modality="image",
        hidden_size=768,
        num_attention_heads=12,
        num_hidden_layers=10,
        prenet_depth=2,
        mlp_ratio=4.0,
        layer_norm_eps=1e-6,
        extra_tokens=1,
        image_size=(224, 224),
        patch_size=16,
        num_channels=3,
        conv_layers=(),
        log_mel=None,
        position_kernel=19,
        position_groups=16,
        position_layers=5,
        alibi=True,
        vocab_size=0,
        max_positions=512,
        pad_token_id=None,
        **kwargs,
    ):
        self.modality = modality
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.prenet_depth = prenet_depth
        self.mlp_ratio = mlp_ratio
        self.layer_norm_eps = layer_norm_eps
        self.extra_tokens = extra_tokens
        self.image_size = list(image_size)
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.conv_layers = [list(layer) for layer in conv_layers]
        self.log_mel = None if log_mel is None else dict(log_mel)
        self.position_kernel = position_kernel
        self.position_groups = position_groups
        self.position_layers = position_layers
        self.alibi = alibi
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        super().__init__(pad_token_id=pad_token_id, **{"tie_word_embeddings": False, **kwargs})

    @property
    def inputs_to_logits_ratio(self):
        """Samples a frame, by which transformers' pipelines cut long speech into chunks."""
        return math.prod(stride for _, stride in self.strides)

    @property
    def strides(self):
        """(kernel, stride) of each step from samples to frames."""
        if self.log_mel is not None:
            spectra = self.log_mel
            return [(spectra["window"], spectra["hop"]), (spectra["stack"], spectra["stack"])]
        return [(kernel, stride) for _, kernel, stride in self.conv_layers]
