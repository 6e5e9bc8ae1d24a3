"""X-ray: one page that shows how a model came to each token of its answer, recorded from the real run."""
