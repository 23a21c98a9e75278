#!/bin/sh
# transformers 5: hidden_states[-1] of wav2vec 2.0, HuBERT and WavLM with do_stable_layer_norm (the large models) lacks
# the encoder's final LayerNorm; in 4.57 it has passed it and equals last_hidden_state. No warning, same shape, same call.
#
# Seen with torch 2.13.0 (CPU), largest difference between hidden_states[-1] and last_hidden_state:
#   transformers 4.57.6: Wav2Vec2 0.000, Hubert 0.000, WavLM 0.000
#   transformers 5.24.0: Wav2Vec2 5.033, Hubert 5.026, WavLM 3.162
# The cause: 5.x collects hidden states by hooks on the layers (utils/output_capturing.py), and these models are declared
# with tie_last_hidden_states=False. With do_stable_layer_norm=False both releases agree.
#
# Makes an environment of its own and needs a package index; exits with 1 if either release behaves otherwise.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/look.py" <<'PY'
import sys

import torch
import transformers

torch.manual_seed(0)
sizes = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=[16, 16],
    conv_kernel=[10, 8], conv_stride=[5, 8], num_feat_extract_layers=2, num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True,
)  # fmt: skip
wave = torch.randn(1, 4000)
found = {}
for name in ("Wav2Vec2", "Hubert", "WavLM"):
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    torch.nn.init.normal_(model.encoder.layer_norm.weight, 1.0, 0.5)
    with torch.no_grad():
        out = model(wave, output_hidden_states=True)
    found[name] = (out.hidden_states[-1] - out.last_hidden_state).abs().max().item()
said = ", ".join(f"{name} {difference:.3f}" for name, difference in found.items())
print(f"transformers {transformers.__version__}: {said}")
normed = transformers.__version__.startswith("4.")
sys.exit(any((difference < 1e-5) != normed for difference in found.values()))
PY
status=0
for version in 4.57.6 5.24.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "transformers==$version"
  "$work/$version/bin/python" "$work/look.py" 2>/dev/null || status=1
done
exit $status
