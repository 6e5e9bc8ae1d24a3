"""Speed of a checkpoint against the limits of the machine and, side by side, against transformers."""
