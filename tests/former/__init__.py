"""The corpus and the evaluation with which the embedded checkpoints were trained, until they are trained anew."""
