"""One script per pretraining, and one that fits the judge; the config's `pipeline` key names the script."""
