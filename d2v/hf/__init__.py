"""Hugging Face's transformers, in both directions.

`export` fills a folder with config, weights, modelling code and preprocessor of a model of ours, for
`AutoModel`; `modeling_data2vec2.py` and `configuration_data2vec2.py` are copied into it and run there without
d2v or d2vkern: plain PyTorch and transformers. `encoder` opens their models for our probes, `backbone` puts
them under the heads of fine-tuning.
"""
