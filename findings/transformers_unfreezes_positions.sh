#!/bin/sh
# transformers 5: ViTMAEModel.from_pretrained returns the fixed sine-cosine position table as a trained parameter. A new
# ViTMAEModel, and in 4.57 an opened one too, has it with requires_grad=False ("fixed sin-cos embedding" in its code), so
# whoever fine-tunes over model.parameters() trains one more table in 5.x than in 4.57, silently.
#
# Seen with torch 2.13.0 (CPU), requires_grad of embeddings.position_embeddings:
#   transformers 4.57.6: new False, opened False
#   transformers 5.24.0: new False, opened True
#
# Makes an environment of its own and needs a package index; exits with 1 if either release behaves otherwise.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/look.py" <<'PY'
import sys
import tempfile

import transformers

config = transformers.ViTMAEConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=24, patch_size=4
)
model = transformers.ViTMAEModel(config)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    opened = transformers.ViTMAEModel.from_pretrained(folder)
new, loaded = (m.embeddings.position_embeddings.requires_grad for m in (model, opened))
print(f"transformers {transformers.__version__}: new {new}, opened {loaded}")
sys.exit(new or loaded == transformers.__version__.startswith("4."))
PY
status=0
for version in 4.57.6 5.24.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "transformers==$version"
  "$work/$version/bin/python" "$work/look.py" 2>/dev/null || status=1
done
exit $status
