"""One script per pretraining, and one that fits the classifier; the config's `pipeline` key names the script."""
