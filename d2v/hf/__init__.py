"""A Hugging Face folder: config, weights, modelling code and preprocessor of a model, for `AutoModel`.

`modeling_data2vec2.py` and `configuration_data2vec2.py` are copied into the folder and run there, without d2v
or d2vkern: plain PyTorch and transformers. `export` fills the folder.
"""
