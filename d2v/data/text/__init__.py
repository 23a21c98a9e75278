"""Text: files, tokenizer, blocks of tokens, labelled sentences."""
