"""Hugging Face's transformers, in both directions.

`export` fills a folder with config, weights, code, `preprocessors` and model `card` of a model of ours, for
`AutoModel` and its kin; the `*_data2vec2.py` files are copied into it and run there without d2v or d2vkern:
plain PyTorch and transformers. `encoder` opens their models for our probes, `backbone` puts them under the
heads of fine-tuning.
"""
