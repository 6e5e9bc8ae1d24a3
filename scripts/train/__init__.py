"""The training of the embedded checkpoints. Corpus and data are made here; nothing is downloaded."""
