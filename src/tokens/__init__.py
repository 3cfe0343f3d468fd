"""How does text become batches? Tokenizer, corpora, shards, shuffle, loader."""
