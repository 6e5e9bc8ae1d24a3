"""One model on many GPUs: the lesson is README.md, and train.py trains on several of them."""
